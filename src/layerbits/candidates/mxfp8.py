"""MXFP8 fake quantization in plain PyTorch, as ModelOpt's CUDA kernel computes it.

E4M3 values, one power-of-two scale per block: bit for bit those of ModelOpt's ``MXFP8QTensor``, but for blocks whose
scale is a subnormal number. The arithmetic follows ``tensor_quant_mx.cu``
(``compute_scale_e8m0_NV``), built with ``--use_fast_math`` as for MXFP4: subnormal FP32 numbers count as zero, and
``amax / 448`` is ``amax`` times the hardware's reciprocal of 448. A NaN makes its whole block NaN here, so that it is
seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerbits.candidates import fp4
from layerbits.errors import UserError

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer

MXFP8_BACKEND = "layerbits_mxfp8"
BLOCK_SIZES = (8, 16, 32)

_E4M3_MAX = 448.0
_EXPONENT_OF_ONE = 127


def mxfp8(x: Tensor, block_size: int = 32) -> Tensor:
    """Fake-quantizes to MXFP8: E4M3 values, the scale of a block ``2 ** ceil(log2(amax / 448))``.

    The last block of a row may be short. The gradient passes straight through.

    Args:
        x: ``[..., n]`` float32, float16 or bfloat16.
        block_size: 8, 16 or 32, what ModelOpt's kernel takes.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        UserError: Another dtype, no dimension, or another block size.
    """
    if block_size not in BLOCK_SIZES:
        raise UserError(f"MXFP8 block size {block_size} is not one of {BLOCK_SIZES}: use 32")
    return fp4.block_fake_quant(x, _blocks, block_size)


def mxfp8_exponents(x: Tensor, block_size: int = 32) -> Tensor:
    """The scales of :func:`mxfp8` as exponents with bias 127, uint8 ``[rows, blocks]``; of zeros the smallest.

    Args:
        x: ``[rows, n]``, whole blocks.
        block_size: As there.
    """
    return _exponent(_ratio(fp4.block_magnitudes(x, block_size)[..., None]))[..., 0].to(torch.uint8)


def _blocks(blocks: Tensor) -> Tensor:
    """Quantizes ``[rows, blocks, size]`` FP32, a scale per block."""
    magnitude = torch.threshold_(blocks.abs(), fp4.FP32_LARGEST_SUBNORMAL, 0.0)
    amax = magnitude.amax(-1, keepdim=True)
    ratio = _ratio(amax)
    exponent = _exponent(ratio)
    scale = ((2 * _EXPONENT_OF_ONE - exponent) << 23).view(torch.float32)
    unscale = (exponent << 23).view(torch.float32)
    unscale.masked_fill_(ratio == 0.0, 0.0)
    unscale.masked_fill_(amax.isnan(), torch.nan)
    values = magnitude.mul_(scale).nan_to_num_(nan=_E4M3_MAX).clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    return values.mul_(unscale).copysign_(blocks)


def _ratio(amax: Tensor) -> Tensor:
    """Ranges ``[rows, blocks, 1]`` over 448."""
    ratio = amax.clamp(max=fp4.FP32_MAX) * fp4.device_reciprocal(torch.full_like(amax[:1, :1], _E4M3_MAX))
    return torch.threshold_(ratio, fp4.FP32_LARGEST_SUBNORMAL, 0.0)


def _exponent(ratio: Tensor) -> Tensor:
    """``ceil(log2(ratio))`` with bias 127, int32: a mantissa other than zero counts up."""
    bits = ratio.view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0).int()).clamp_(1, 2 * _EXPONENT_OF_ONE - 1)


def entrypoint(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """What ModelOpt calls for :data:`MXFP8_BACKEND`."""
    return mxfp8(inputs, fp4.block_size_of(inputs, quantizer))
