"""ModelOpt's quantizers with kernels that run at the memory's speed; what they give is the same to the bit.

ModelOpt's CUDA extensions read and write number by number, at a fifth of an H100's bandwidth. A pass quantizes the
weights of a model for every candidate, those of experts in every step, and there it took a third of the time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from layerbits.candidates import fp4
from layerbits.candidates.linear import E8M0, FP4, FP8

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from triton.runtime import JITFunction

Bits = int | tuple[int, int]
"""Of an integer, or exponent and mantissa of a float."""

_TILE = 4096
"""Numbers a program."""
_LEAST_WIDTH = 16
"""Neighbouring numbers of one range, below which ModelOpt's own kernel is used."""


@cache
def quantizer_class() -> type[TensorQuantizer]:
    """ModelOpt's ``TensorQuantizer``, on a GPU with the kernels here where there is one for its setting."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    class FusedQuantizer(TensorQuantizer):  # type: ignore[misc]
        """A quantizer of one setting."""

        def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
            forward_only = not (torch.is_grad_enabled() and inputs.requires_grad)
            made = fused(self, inputs) if inputs.is_cuda and forward_only else None
            return super()._fake_quantize(inputs) if made is None else made

    return FusedQuantizer


def has_kernel(setting: TensorQuantizer | QuantizerAttributeConfig) -> bool:
    """Whether there is a kernel here for a setting, as far as it is known without a tensor.

    Args:
        setting: A ``TensorQuantizer``, or the attributes of one.
    """
    bits, blocks = _bits(setting), setting.block_sizes or {}
    if setting.bias is not None:
        return False
    if blocks.get("type") == "dynamic":
        scale = tuple(blocks.get("scale_bits") or ())
        return (bits, scale) == (FP4, E8M0) and setting.backend in (None, fp4.MXFP4_BACKEND)
    return setting.backend is None and (bits == FP8 or (isinstance(bits, int) and not setting.unsigned))


def fused(quantizer: TensorQuantizer, x: torch.Tensor) -> torch.Tensor | None:
    """Quantizes by a kernel here.

    Args:
        quantizer: A ``TensorQuantizer``.
        x: What ModelOpt gives its kernels: on a GPU, contiguous, static blocks as rows.

    Returns:
        A tensor like ``x``, ``None`` where there is no kernel.
    """
    if not has_kernel(quantizer):
        return None
    if (quantizer.block_sizes or {}).get("type") == "dynamic":
        return _mxfp4(x, fp4.block_size_of(x, quantizer))
    amax = quantizer._get_amax(x)  # calibrated, pinned, or this tensor's: ModelOpt's own choice has no public name
    rows = _rows(x, amax)
    return None if rows is None else _by_rows(x, amax.reshape(-1), rows, _bits(quantizer), quantizer.narrow_range)


def _bits(setting: TensorQuantizer | QuantizerAttributeConfig) -> Bits:
    bits = setting.num_bits
    return tuple(bits) if isinstance(bits, tuple | list) else bits


def _rows(x: torch.Tensor, amax: torch.Tensor) -> int | None:
    """How many rows of neighbouring numbers with one range there are."""
    if amax.numel() == 1:
        return 1
    if amax.squeeze().dim() > 1:
        return None
    width = x.stride(tuple(amax.shape).index(amax.numel()))
    return x.numel() // width if width >= _LEAST_WIDTH else None


def _by_rows(x: torch.Tensor, amax: torch.Tensor, rows: int, bits: Bits, narrow: bool) -> torch.Tensor:
    import triton

    made = torch.empty_like(x)
    width = x.numel() // rows
    columns = min(_TILE, triton.next_power_of_2(width))
    height = _TILE // columns
    bound = float(2 ** (bits - 1) - 1) if isinstance(bits, int) else 0.0
    lowest = -bound if narrow else -bound - 1
    grid = (triton.cdiv(rows, height) * triton.cdiv(width, columns),)
    _kernel("quantize_rows")[grid](
        x, made, amax.to(x.device), rows, width, len(amax), bound, lowest,
        FLOAT=bits == FP8, ROWS=height, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return made


def _mxfp4(x: torch.Tensor, size: int) -> torch.Tensor:
    import triton

    made = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    blocks = min(_TILE // size, triton.next_power_of_2(triton.cdiv(width, size)))
    height = _TILE // (blocks * size)
    grid = (triton.cdiv(rows, height) * triton.cdiv(width, blocks * size),)
    _kernel("quantize_mxfp4")[grid](x, made, rows, width, SIZE=size, ROWS=height, BLOCKS=blocks, num_warps=8)
    return made


@cache
def _kernel(name: str) -> JITFunction:
    import triton

    from layerbits.scoring import fake_quant_kernel

    return triton.jit(getattr(fake_quant_kernel, name))
