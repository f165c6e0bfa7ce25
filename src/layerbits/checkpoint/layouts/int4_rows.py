"""ModelOpt's INT4: a byte holds rows ``2i`` (low four bits) and ``2i + 1`` of a column, in two's complement."""

from __future__ import annotations

import torch

from layerbits.checkpoint.layouts.base import Layout, Scale


def int4_rows(block: int, scale: Scale) -> Layout:
    """The layout, with a scale per ``block`` columns."""
    return Layout("weight", "uint8", (2, 1), _unpack, block, scale)


def _unpack(stored: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([stored & 15, stored >> 4], 1).flatten(0, 1).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes).float()
