"""FP4 (E2M1: a sign, then 0, .5, 1, 1.5, 2, 3, 4, 6): a byte holds columns ``2j`` (low four bits) and ``2j + 1``."""

from __future__ import annotations

import torch

from layerbits.checkpoint.layouts.base import Layout, Scale

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(tensor: str) -> Layout:
    """MXFP4 in the tensor of that name: an exponent per 32 columns."""
    return Layout(tensor, "uint8", (1, 2), _unpack, 32, Scale("weight_scale", None, "uint8"))


def nvfp4(tensor: str, second: Scale) -> Layout:
    """NVFP4 in the tensor of that name: an E4M3 scale per 16 columns, and a second one for all."""
    return Layout(tensor, "uint8", (1, 2), _unpack, 16, Scale("weight_scale", None, "float8_e4m3fn"), second)


def _unpack(stored: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=stored.device)
    return table[torch.stack([stored & 15, stored >> 4], -1).flatten(1).long()]
