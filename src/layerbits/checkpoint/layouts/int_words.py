"""compressed-tensors' ``pack-quantized``: integers along a row in words of 32 bits, low bits first, offset to ≥ 0."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from layerbits.checkpoint.layouts.base import Layout, Scale


def int_words(bits: int, block: int | None, scale: Scale) -> Layout:
    """The layout of integers of 4 or 8 bits: of widths that fill their words."""
    return Layout("weight_packed", "int32", (1, 32 // bits), _unpack(bits), block, scale, with_shape=True)


@functools.cache
def _unpack(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def unpack(stored: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(0, 32, bits, device=stored.device, dtype=torch.int32)
        codes = (stored[..., None] >> shifts) & ((1 << bits) - 1)
        return (codes - (1 << (bits - 1))).flatten(1).float()

    return unpack
