"""Where in the rows the damage is: by position, by how sure the unquantized model is, and by the source of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerbits.results.result import FloatArray

if TYPE_CHECKING:
    import torch

    from layerbits.inputs.calibration import Segment

QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
_SURE = (0.0, 0.25, 0.5, 0.9)
CONFIDENCES = ("sure < 0.25", "sure 0.25–0.5", "sure 0.5–0.9", "sure ≥ 0.9")


@dataclass(frozen=True)
class Slice:
    """The KL divergence of some of the tokens, nats per token.

    Attributes:
        name: One of :data:`QUARTERS`, of the row, or :data:`CONFIDENCES`, the unquantized model's largest probability,
            or ``from <source>``.
        tokens: How many.
        kl: Mean.
        p99: 99th percentile.
    """

    name: str
    tokens: int
    kl: float
    p99: float


def places(segment: Segment) -> FloatArray:
    """``[n]`` position of the counted tokens of a segment, as a share of the row, padding left out."""
    length = segment.input_ids.shape[1]
    lengths = segment.attention_mask.sum(1) if segment.attention_mask is not None else None
    rows, columns = segment.loss_mask.nonzero(as_tuple=True)
    ends = np.full(len(rows), float(length)) if lengths is None else lengths[rows].cpu().double().numpy()
    return np.asarray(columns.cpu().double().numpy() / ends, dtype=np.float64)


def confidences(logits: torch.Tensor, partition: torch.Tensor) -> FloatArray:
    """``[n]`` largest probability of each token's prediction.

    Args:
        logits: ``[n, vocabulary]``.
        partition: ``[n]`` their ``log Σ exp``.
    """
    top = logits.amax(-1).double().cpu() - partition.double().cpu()
    return np.asarray(top.exp().numpy(), dtype=np.float64)


def slices(kl: FloatArray, place: FloatArray, confidence: FloatArray, source: Sequence[str] = ()) -> tuple[Slice, ...]:
    """The KL divergence by position, by confidence and by source; slices without a token are left out.

    Args:
        kl: ``[n]`` nats.
        place: ``[n]`` position in the row, a share.
        confidence: ``[n]`` largest probability of the unquantized model.
        source: ``[n]`` where a token's text is from; empty = nothing is known. One source alone is no slice.
    """
    quarter = np.minimum((4 * place).astype(int), 3)
    sure = np.digitize(confidence, _SURE[1:])
    names = list(dict.fromkeys(source))
    number = {name: i for i, name in enumerate(names)}
    which = np.asarray([number[name] for name in source], dtype=int)
    by_source = _cut(kl, which, [f"from {name}" for name in names]) if len(names) > 1 else []
    return (*_cut(kl, quarter, QUARTERS), *_cut(kl, sure, CONFIDENCES), *by_source)


def _cut(kl: FloatArray, which: np.ndarray[tuple[int, ...], np.dtype[np.int_]], names: Sequence[str]) -> list[Slice]:
    parts = [(name, kl[which == i]) for i, name in enumerate(names)]
    return [
        Slice(name, len(part), float(part.mean()), float(np.quantile(part, 0.99))) for name, part in parts if len(part)
    ]
