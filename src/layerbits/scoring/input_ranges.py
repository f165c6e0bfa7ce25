"""Ranges of inputs over many batches: the largest magnitude, or a percentile of the blocks' with headroom above it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerbits.errors import UserError
from layerbits.scoring.quantizers import largest


@dataclass(frozen=True)
class RangeKind:
    """What a range is; equal for quantizers that want the same.

    Attributes:
        axis: The quantizer's axis: ``None`` = one range, ``-1`` = one per feature.
        headroom: Settings of ``nvfp4_act_headroom`` in order of their names, with the block length; ``None`` = largest
            magnitude.
    """

    axis: Any
    headroom: tuple[tuple[str, float], ...] | None = None

    @classmethod
    def of(cls, quantizer: Any, headroom: Mapping[str, float] | None) -> RangeKind:
        """What a quantizer wants."""
        if headroom is None:
            return cls(quantizer.axis)
        return cls(None, (*sorted(headroom.items()), ("block_size", quantizer.block_sizes.get(-1, 16))))


class InputRange:
    """A range that grows with what is seen."""

    def __init__(self, kind: RangeKind, x: torch.Tensor) -> None:
        self._kind = kind
        if kind.headroom is None:
            self._found = largest(x, kind.axis)
            return
        from modelopt.torch.quantization.calib import NVFP4ActHeadroomCalibrator

        settings: dict[str, Any] = dict(kind.headroom)
        self._found = NVFP4ActHeadroomCalibrator(**{**settings, "block_size": int(settings["block_size"])})
        try:
            self._found.collect(x)
        except AssertionError:
            raise UserError("an input is not finite; try model.dtype=float32 or bfloat16") from None

    def join(self, other: InputRange) -> InputRange:
        """The range of what both have seen, a new one."""
        made = copy.copy(self)
        if self._kind.headroom is None:
            made._found = torch.maximum(self._found, other._found)
            return made
        made._found = copy.copy(self._found)
        parts = [r._found._hist for r in (self, other) if r._found._hist is not None]
        made._found._hist = sum(parts[1:], start=parts[0]) if parts else None
        made._found._running_max = torch.maximum(self._found._running_max, other._found._running_max)
        return made

    @property
    def amax(self) -> Any:
        """The range as ModelOpt's quantizers take it."""
        if self._kind.headroom is None:
            return self._found
        found = self._found.compute_amax()
        return self._found._running_max if found is None else found
