"""The unquantized model's predictions of some held-out tokens, kept to compare those of a changed model with.

They are compared by :func:`layerbits.scoring.divergence.token_changes`, in one pass over the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerbits.probing.measured import Difference
from layerbits.probing.slices import confidences, places, slices
from layerbits.results.bootstrap import standard_error
from layerbits.results.result import FloatArray
from layerbits.scoring.divergence import log_partition, token_changes
from layerbits.scoring.steps import predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch, Segment

_MAY_KEEP = 0.25  # of a GPU's free memory, for kept logits; host memory takes them otherwise


@dataclass(frozen=True)
class _Kept:
    """One segment: ``n`` counted tokens.

    Attributes:
        segment: The rows.
        logits: ``[n, vocabulary]`` in the model's dtype.
        partition: ``[n]`` float32 ``log Σ exp`` of them.
        targets: ``[n]`` tokens that came true.
    """

    segment: Segment
    logits: torch.Tensor
    partition: torch.Tensor
    targets: torch.Tensor


class UnquantizedLogits:
    """The unquantized model's logits at the counted tokens of some batches.

    Args:
        model: The whole model, unquantized.
        batches: The rows. Their loss mask says which tokens count, so that padding has no part in any figure.
        sources: Where each caption is from, by its number in the caption list; empty = nothing is known.

    Attributes:
        caption_tokens: ``[captions]`` counted tokens of each caption, in the order of the caption list.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], sources: Sequence[str] = ()) -> None:
        self._kept = []
        with torch.no_grad():
            for segment in (s for batch in batches for s in batch.segments if bool(s.loss_mask.any())):
                logits, targets = _predicted(model, segment)
                kept = logits if _fits(logits) else logits.cpu()
                self._kept.append(_Kept(segment, kept, log_partition(logits), targets))
        owners = torch.cat([k.segment.sample[k.segment.loss_mask] for k in self._kept]).numpy()
        _, self._caption, tokens = np.unique(owners, return_inverse=True, return_counts=True)
        self.caption_tokens = tuple(tokens.tolist())
        self._source = [sources[owner] for owner in owners] if sources else []
        self._place = np.concatenate([places(k.segment) for k in self._kept])
        self._confidence = np.concatenate([confidences(k.logits, k.partition) for k in self._kept])

    @property
    def tokens(self) -> int:
        """Counted tokens."""
        return len(self._caption)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the largest segment."""
        return max(int(k.segment.input_ids.numel()) for k in self._kept)

    @property
    def finite(self) -> bool:
        """Whether all of the logits are numbers."""
        return all(bool(torch.isfinite(k.partition).all()) for k in self._kept)

    @property
    def perplexity(self) -> float:
        """Of the unquantized model."""
        return math.exp(float(np.concatenate([self._loss(k) for k in self._kept]).mean()))

    def compare(self, model: PreTrainedModel, row_by_row: bool = False) -> tuple[Difference, tuple[float, ...]]:
        """Runs a model on the same rows and compares.

        Args:
            model: The model as it is now; its dtype may be another.
            row_by_row: Run single rows instead of batches.

        Returns:
            The difference, and ``[captions]`` the KL divergence summed over the tokens of each caption.
        """
        with torch.no_grad():
            changes = [
                token_changes(kept.logits, kept.partition, _predicted(model, kept.segment, row_by_row)[0], kept.targets)
                for kept in self._kept
            ]
        kl, change = _joined([c.kl for c in changes]), _joined([c.loss for c in changes])
        largest, squares = _joined([c.largest for c in changes]), _joined([c.squares for c in changes])
        same = _joined([c.same_top for c in changes])
        captions: FloatArray = np.bincount(self._caption, weights=kl).astype(np.float64)
        if bad := int((~np.isfinite(largest)).sum()):
            nan = math.nan
            return Difference(len(kl), nan, nan, nan, nan, nan, nan, nan, bad), tuple(captions.tolist())
        loss = np.concatenate([self._loss(k) for k in self._kept]) + change
        return Difference(
            tokens=len(kl),
            perplexity=math.exp(float(loss.mean())),
            kl=float(kl.mean()),
            kl_se=standard_error(captions, self.caption_tokens)[1],
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(same.mean()),
            logit_mse=float(squares.mean()) / self._kept[0].logits.shape[1],
            logit_max_error=float(largest.max()),
            kl_median=float(np.quantile(kl, 0.5)),
            kl_p90=float(np.quantile(kl, 0.9)),
            slices=slices(kl, self._place, self._confidence, self._source),
        ), tuple(captions.tolist())

    def _loss(self, kept: _Kept) -> FloatArray:
        chosen = kept.logits.gather(1, kept.targets[:, None].to(kept.logits.device))[:, 0]
        return np.asarray((kept.partition.double().cpu() - chosen.double().cpu()).numpy())


def _joined(values: Sequence[torch.Tensor]) -> FloatArray:
    return np.asarray(torch.cat(list(values)).double().cpu().numpy())


def _predicted(model: PreTrainedModel, segment: Segment, row_by_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and next tokens of a segment's counted positions."""
    if not row_by_row:
        return predictions(model, segment)
    pieces = [predictions(model, row) for row in _rows(segment)]
    return torch.cat([logits for logits, _ in pieces]), torch.cat([targets for _, targets in pieces])


def _rows(segment: Segment) -> list[Segment]:
    return [segment.part(slice(i, i + 1)) for i in range(len(segment.input_ids)) if bool(segment.loss_mask[i].any())]


def _fits(logits: torch.Tensor) -> bool:
    from layerbits.scoring.memory import free_bytes

    wanted = logits.numel() * logits.element_size()
    return not logits.is_cuda or wanted < _MAY_KEEP * free_bytes(logits.device)
