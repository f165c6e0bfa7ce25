"""What an exported checkpoint computes, beside what the scheme computed on the model that was scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerbits.probe import compare

if TYPE_CHECKING:
    from layerbits.calibration import Batch

Logits = list[tuple[Any, Any]]
"""Per segment ``[n, vocabulary]`` logits and ``[n]`` next tokens, in host memory."""

_ROWS = 8


@dataclass(frozen=True)
class LogitProof:
    """Logits of the restored checkpoint against those of the applied scheme.

    Attributes:
        tokens: Positions compared.
        effect: Root mean square by which the scheme changes the unquantized model's logits.
        deviation: Root mean square by which the checkpoint's differ from the scheme's.
        bound: What ``deviation / effect`` may be.
        kl: Mean KL divergence of the checkpoint from the scheme, nats per token.
        kl_scheme: The same of the scheme from the unquantized model.
        max_error: Largest difference of a logit from the scheme's.
    """

    tokens: int
    effect: float
    deviation: float
    bound: float
    kl: float
    kl_scheme: float
    max_error: float

    @property
    def ratio(self) -> float:
        """Deviation as a share of the effect."""
        return self.deviation / self.effect if self.effect else math.inf

    @property
    def passed(self) -> bool:
        """Whether it is within the bound."""
        return self.ratio <= self.bound


def some_rows(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The first rows of some batches, few enough to run on them three times."""
    segment = batches[0].segments[0]
    mask = segment.attention_mask
    few = replace(
        segment,
        input_ids=segment.input_ids[:_ROWS],
        attention_mask=None if mask is None else mask[:_ROWS],
        loss_mask=segment.loss_mask[:_ROWS],
        sample=segment.sample[:_ROWS],
    )
    return (replace(batches[0], segments=(few,)),)


def logits_of(model: Any, batches: Sequence[Batch]) -> Logits:
    """A model's logits at the positions that the batches count."""
    return list(_logits(model, batches))


def compare_logits(unquantized: Logits, scheme: Logits, restored: Logits, bound: float) -> LogitProof:
    """Compares the logits of the three models."""
    effect = compare(iter(scheme), unquantized)
    deviation = compare(iter(restored), scheme)
    return LogitProof(
        tokens=deviation.tokens,
        effect=math.sqrt(effect.logit_mse),
        deviation=math.sqrt(deviation.logit_mse),
        bound=bound,
        kl=deviation.kl,
        kl_scheme=effect.kl,
        max_error=deviation.logit_max_error,
    )


def _logits(model: Any, batches: Sequence[Batch]) -> Iterator[tuple[Any, Any]]:
    import torch

    from layerbits.scoring.steps import predictions

    with torch.no_grad():
        for batch in batches:
            for segment in batch.segments:
                logits, targets = predictions(model, segment)
                yield logits.cpu(), targets.cpu()
