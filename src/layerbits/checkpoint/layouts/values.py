"""FP8 (E4M3) and INT8 values as they are, an element each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.checkpoint.layouts.base import Layout, Scale

if TYPE_CHECKING:
    import torch


def values(dtype: str, block: int | None, scale: Scale) -> Layout:
    """The layout.

    Args:
        dtype: ``float8_e4m3fn`` or ``int8``.
        block: As :attr:`Layout.block`.
        scale: As :attr:`Layout.scale`.
    """
    return Layout("weight", dtype, (1, 1), _unpack, block, scale)


def _unpack(stored: torch.Tensor) -> torch.Tensor:
    return stored.float()
