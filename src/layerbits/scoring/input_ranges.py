"""Ranges of inputs over many batches: the largest magnitude, or a percentile of the blocks' with headroom above it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError
from layerbits.scoring.quantizers import Options, largest

if TYPE_CHECKING:
    from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator
    from modelopt.torch.quantization.nn import TensorQuantizer


@dataclass(frozen=True)
class RangeKind:
    """What a range is; equal for quantizers that want the same.

    Attributes:
        axis: The quantizer's axis: ``None`` = one range, ``-1`` = one per feature.
        headroom: Settings of ``nvfp4_act_headroom`` in order of their names, with the block length; ``None`` = largest
            magnitude.
    """

    axis: int | tuple[int, ...] | None
    headroom: tuple[tuple[str, float], ...] | None = None

    @classmethod
    def of(cls, quantizer: TensorQuantizer, headroom: Options | None) -> RangeKind:
        """What a quantizer wants."""
        if headroom is None:
            return cls(quantizer.axis)
        return cls(None, (*sorted(headroom.items()), ("block_size", quantizer.block_sizes.get(-1, 16))))


class InputRange:
    """A range that grows with what is seen.

    Args:
        kind: What the range is.
        x: The first input.

    Raises:
        UserError: The input is not finite.
    """

    def __init__(self, kind: RangeKind, x: torch.Tensor) -> None:
        self._largest: torch.Tensor | None = None
        self._calibrator: NVFP4ActHeadroomCalibrator | None = None
        if kind.headroom is None:
            self._largest = largest(x, kind.axis)
            return
        from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator

        settings = dict(kind.headroom)
        self._calibrator = NVFP4ActHeadroomCalibrator(**{**settings, "block_size": int(settings["block_size"])})
        try:
            self._calibrator.collect(x)
        except AssertionError:
            raise UserError("an input is not finite; try model.dtype=float32 or bfloat16") from None

    def join(self, other: InputRange) -> InputRange:
        """The range of what both have seen, a new one; both are of one kind."""
        made = copy.copy(self)
        if self._largest is not None and other._largest is not None:
            made._largest = torch.maximum(self._largest, other._largest)
        if self._calibrator is not None and other._calibrator is not None:
            made._calibrator = _joined(self._calibrator, other._calibrator)
        return made

    @property
    def amax(self) -> torch.Tensor:
        """The range as ModelOpt's quantizers take it."""
        if self._calibrator is None:
            assert self._largest is not None
            return self._largest
        amax = self._calibrator.compute_amax()
        return self._calibrator._running_max if amax is None else amax


def _joined(one: NVFP4ActHeadroomCalibrator, other: NVFP4ActHeadroomCalibrator) -> NVFP4ActHeadroomCalibrator:
    """A calibrator that has seen what two have seen."""
    made = copy.copy(one)
    histograms = [c._hist for c in (one, other) if c._hist is not None]
    made._hist = sum(histograms[1:], start=histograms[0]) if histograms else None
    made._running_max = torch.maximum(one._running_max, other._running_max)
    return made
