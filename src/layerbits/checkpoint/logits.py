"""What an exported checkpoint computes, beside what the scheme computed on the model that was scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from layerbits.scoring.divergence import exact_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch

Logits = list[torch.Tensor]
"""Per segment ``[tokens, vocabulary]``, in host memory."""

_TOKENS = 1024


BOUND = 0.05
"""Share of the scheme's effect by which the checkpoint's logits may differ from the scheme's at the stored numbers.

Weights and scales are then the same to the last bit and only the way differs that inputs are rounded: 0 is expected,
and what is allowed is that a few inputs between two steps fall to the other side.
"""
DRIFT_BOUND = 1.5
"""The same from the scheme as it was scored: two independent roundings of everything would make the square root of 2.

A difference in the last bit is enough for that where a scheme rounds activations, layer after layer, and NVFP4's shared
scales are one; so this bound only tells a checkpoint of the scheme from something else.
"""


@dataclass(frozen=True)
class LogitProof:
    """Logits of the model that is restored from the checkpoint alone.

    Attributes:
        tokens: Positions compared.
        effect: Root mean square by which the scheme changes the unquantized model's logits.
        deviation: The same of the checkpoint from the scheme at the stored numbers (:func:`restore.at_stored_numbers`).
        drift: The same of the checkpoint from the scheme as it was scored.
        max_error: Largest difference of a logit in ``deviation``.
        kl_scheme: Mean KL divergence of the scheme from the unquantized model, nats per token.
        kl_checkpoint: The same of the checkpoint.
    """

    tokens: int
    effect: float
    deviation: float
    drift: float
    max_error: float
    kl_scheme: float
    kl_checkpoint: float

    @property
    def deviation_ratio(self) -> float:
        """Deviation as a share of the effect; at most :data:`BOUND`."""
        return _share(self.deviation, self.effect)

    @property
    def drift_ratio(self) -> float:
        """Drift as a share of the effect; at most :data:`DRIFT_BOUND`."""
        return _share(self.drift, self.effect)

    @property
    def problem(self) -> str:
        """What is wrong, empty where nothing is."""
        for ratio, bound, what in (
            (self.deviation_ratio, BOUND, "the scheme's at the stored numbers"),
            (self.drift_ratio, DRIFT_BOUND, "the scored scheme's"),
        ):
            if not ratio <= bound:
                return f"its logits differ from {what} by {ratio:.3g} of the scheme's effect, {bound:g} is allowed"
        return ""


def some_rows(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The first rows of some batches, about a thousand tokens: all logits of four models are kept."""
    segment = batches[0].segments[0]
    rows = max(1, _TOKENS // segment.input_ids.shape[1])
    return (replace(batches[0], segments=(segment.part(slice(rows)),)),)


def logits_of(model: PreTrainedModel, batches: Sequence[Batch]) -> Logits:
    """A model's logits at the positions that the batches count."""
    from layerbits.scoring.steps import predictions

    with torch.no_grad():
        return [predictions(model, segment)[0].cpu() for batch in batches for segment in batch.segments]


def compare_logits(unquantized: Logits, scheme: Logits, stored: Logits, restored: Logits) -> LogitProof:
    """Compares the logits of four models.

    Args:
        unquantized: The model without the scheme.
        scheme: With it, as scored.
        stored: With it, at the numbers that the checkpoint stores.
        restored: Made from the checkpoint alone.
    """
    effect, deviation = exact_difference(scheme, unquantized), exact_difference(restored, stored)
    return LogitProof(
        tokens=sum(len(logits) for logits in restored),
        effect=effect.rms,
        deviation=deviation.rms,
        drift=exact_difference(restored, scheme).rms,
        max_error=deviation.largest,
        kl_scheme=effect.kl,
        kl_checkpoint=exact_difference(restored, unquantized).kl,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
