"""MXFP4 and NVFP4 fake quantization in plain PyTorch, bit for bit what ModelOpt's CUDA kernels compute.

ModelOpt 0.47 fake-quantizes FP4 on CUDA alone. The two functions here repeat that arithmetic on any device, and
:func:`register_backends` makes them available to ModelOpt's quantizers by name. The arithmetic follows
``tensor_quant_mx.cu`` (MXFP4, built with ``--use_fast_math``: subnormal FP32 numbers count as zero, ``a / b`` is
``a`` times the hardware's reciprocal of ``b``) and ``fp4_kernel_hopper.py`` (NVFP4; Triton's ``/`` is PTX
``div.full.f32``, again a product with the reciprocal). Zeros may differ from the kernels' in sign. A NaN, which the
kernels turn into a finite number, makes its whole block NaN here, so that it is seen.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from layerbits.errors import UserError

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer

MXFP4_BACKEND = "layerbits_mxfp4"
NVFP4_BACKEND = "layerbits_nvfp4"

_E2M1_MAX = 6.0
_E4M3_MAX = 448.0
_E4M3_CODE_OF_6 = 0x4C
FP32_MAX = torch.finfo(torch.float32).max
_FP32_TINY = torch.finfo(torch.float32).tiny
_FP32_SMALLEST = 2.0**-149
FP32_LARGEST_SUBNORMAL = _FP32_TINY - _FP32_SMALLEST
_MXFP4_BLOCK_SIZES = (8, 16, 32)
_NVFP4_BLOCK_SIZE = 16
_NVFP4_MIN_SCALE = 1e-5
"""Block scales below it are replaced by 1 (``fp4_kernel_hopper.py``)."""
_NVFP4_MIN_GLOBAL_SCALE = 1e-12
_RECIPROCAL_ROUNDING = 2023
"""What the reciprocal unit adds to its sum before it drops the 15 lowest bits."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda_kernels_available() -> bool:
    """Says whether ModelOpt's own FP4 kernels can run here, without building them.

    ModelOpt builds its MX extension at first use (about 40 s) and needs the toolchain in every process, also to load
    an earlier build. So besides a GPU this looks for nvcc, ninja and a C++ compiler; a build that has failed or
    succeeded in this process settles it.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    from modelopt.torch.quantization.extensions import get_cuda_ext_mx
    from torch.utils import cpp_extension

    if hasattr(get_cuda_ext_mx, "extension"):
        return get_cuda_ext_mx.extension is not None
    nvcc = os.environ.get("PYTORCH_NVCC") or str(Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc")
    return (
        cpp_extension.CUDA_HOME is not None
        and shutil.which(nvcc) is not None
        and cpp_extension.is_ninja_available()
        and shutil.which(os.environ.get("CXX", "c++")) is not None
    )


def mxfp4(x: Tensor, block_size: int = 32) -> Tensor:
    """Fake-quantizes to MXFP4: E2M1 values, one power-of-two scale per block of the last dimension.

    The scale is ``2 ** ceil(log2(amax / 6))`` (NVIDIA's rule, not OCP's floor). The last block of a row may be short.
    The gradient passes straight through.

    Args:
        x: ``[..., n]`` float32, float16 or bfloat16.
        block_size: 8, 16 or 32, what ModelOpt's kernel takes.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        UserError: Another dtype, no dimension, or another block size.
    """
    _check(x)
    if block_size not in _MXFP4_BLOCK_SIZES:
        raise UserError(f"MXFP4 block size {block_size} is not one of {_MXFP4_BLOCK_SIZES}: use 32")
    return _apply(x, _mxfp4_blocks, block_size, None)


def nvfp4(x: Tensor, global_amax: Tensor, block_size: int = 16, pass_through_bwd: bool = True) -> Tensor:
    """Fake-quantizes to NVFP4: E2M1 values, an E4M3 scale per block of 16, one FP32 scale per tensor.

    Args:
        x: ``[..., n]`` float32, float16 or bfloat16.
        global_amax: Largest magnitude that the tensor's scale is made for; of several the largest counts.
        block_size: 16; ModelOpt's kernel uses 16 whatever is configured, so another size is refused.
        pass_through_bwd: Whether the gradient passes straight through; otherwise it is zero where
            ``abs(x) > global_amax``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        UserError: Another dtype, no dimension, or another block size.
    """
    _check(x)
    if block_size != _NVFP4_BLOCK_SIZE:
        raise UserError(f"NVFP4 block size {block_size} does not exist: use {_NVFP4_BLOCK_SIZE}")
    global_amax = global_amax.detach().to(x.device)
    largest = global_amax.float().amax().reshape(1)
    return _apply(
        x, lambda blocks: _nvfp4_blocks(blocks, largest), block_size, None if pass_through_bwd else global_amax
    )


def nvfp4_each(x: Tensor, global_amax: Tensor) -> Tensor:
    """:func:`nvfp4` of several tensors in one, each under a scale of its own.

    Args:
        x: ``[n, ...]``, ``n`` tensors.
        global_amax: ``[n]`` largest magnitude of each.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    _check(x)
    each = global_amax.detach().to(x.device).float().reshape(-1)
    return _apply(x, lambda blocks: _nvfp4_blocks(blocks, each), _NVFP4_BLOCK_SIZE, None)


def mxfp4_exponents(x: Tensor, block_size: int = 32) -> Tensor:
    """The scales of :func:`mxfp4` as exponents with bias 127, uint8 ``[rows, blocks]``; of zeros the smallest.

    Args:
        x: ``[rows, n]``, whole blocks.
        block_size: As there.
    """
    return _mxfp4_exponent(block_magnitudes(x, block_size)).to(torch.uint8)


def nvfp4_scales(x: Tensor, global_amax: Tensor, block_size: int = 16) -> Tensor:
    """The block scales of :func:`nvfp4`, E4M3 ``[rows, blocks]``; of zeros the smallest.

    Args:
        x: ``[rows, n]``, whole blocks.
        global_amax: As there.
        block_size: 16.
    """
    whole = global_amax.detach().to(x.device).float().amax().reshape(1)
    codes = _nvfp4_code(block_magnitudes(x, block_size)[None], _nvfp4_grid(whole)[1])[0]
    return codes.clamp(min=1).to(torch.uint8).view(torch.float8_e4m3fn)


def block_magnitudes(x: Tensor, block_size: int) -> Tensor:
    """Largest magnitudes of whole blocks, float32 ``[rows, blocks]``."""
    return x.detach().float().reshape(len(x), -1, block_size).abs().amax(-1)


class _Context(Protocol):
    """What autograd hands to a function and back."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps tensors."""


class _FakeQuant(torch.autograd.Function):
    """Straight-through estimator, with ModelOpt's clipping of the gradient if ``clip_amax`` is given."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, quantize: Callable[[Tensor], Tensor], block_size: int, clip_amax: Tensor | None
    ) -> Tensor:
        if clip_amax is not None:
            ctx.save_for_backward(x, clip_amax)
        rows = x.reshape(-1, x.shape[-1]).float()
        padding = -rows.shape[-1] % block_size
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding))
        out = quantize(rows.reshape(rows.shape[0], -1, block_size)).flatten(1)
        return out[:, : x.shape[-1]].reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if ctx.saved_tensors:
            x, clip_amax = ctx.saved_tensors
            grad = torch.where(x.abs() <= clip_amax, grad, 0)
        return grad, None, None, None


def block_fake_quant(x: Tensor, quantize: Callable[[Tensor], Tensor], block_size: int) -> Tensor:
    """Quantizes the blocks of each row; the gradient passes straight through.

    Args:
        x: ``[..., n]`` float32, float16 or bfloat16; the last block of a row may be short.
        quantize: Takes and gives ``[rows, blocks, size]`` FP32.
        block_size: Values a block.

    Raises:
        UserError: Another dtype, or no dimension.
    """
    _check(x)
    return _apply(x, quantize, block_size, None)


def _apply(x: Tensor, quantize: Callable[[Tensor], Tensor], block_size: int, clip_amax: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    out: Tensor = _FakeQuant.apply(x, quantize, block_size, clip_amax)  # type: ignore[no-untyped-call]
    return out


def _mxfp4_blocks(blocks: Tensor) -> Tensor:
    """Quantizes ``[rows, blocks, size]`` FP32, a scale per block."""
    magnitude = torch.threshold_(blocks.abs(), FP32_LARGEST_SUBNORMAL, 0.0)
    amax = magnitude.amax(-1, keepdim=True)
    exponent = _mxfp4_exponent(amax)
    scale = ((254 - exponent) << 23).view(torch.float32)
    unscale = (exponent << 23).view(torch.float32)
    # amax / 6 is subnormal, hence zero, and so is the scale made from it.
    unscale.masked_fill_(amax < _E2M1_MAX * _FP32_TINY, 0.0)
    unscale.masked_fill_(amax.isnan(), torch.nan)
    return round_e2m1_(magnitude.mul_(scale)).mul_(unscale).copysign_(blocks)


def _mxfp4_exponent(amax: Tensor) -> Tensor:
    """``ceil(log2(amax / 6))`` with bias 127, int32."""
    # From the bits: 6 = 1.5 * 2**2, so a mantissa above 1.5 carries into the exponent.
    return (((amax.clamp(max=FP32_MAX).view(torch.int32) + 0x3FFFFF) >> 23) - 2).clamp_(1, 253)


def _nvfp4_blocks(blocks: Tensor, global_amax: Tensor) -> Tensor:
    """Quantizes ``[rows, blocks, 16]`` FP32, an E4M3 scale per block below one scale for each of ``n`` equal parts.

    Args:
        blocks: The rows of the parts, one part after the other.
        global_amax: ``[n]`` largest magnitude that each part's scale is made for.
    """
    shape, parts = blocks.shape, len(global_amax)
    blocks = blocks.reshape(parts, -1, shape[-1])
    magnitude = blocks.abs()
    amax = magnitude.amax(-1, keepdim=True)
    scales, reciprocals = _nvfp4_grid(global_amax)
    code = _nvfp4_code(amax, reciprocals)
    code += 256 * torch.arange(parts, device=blocks.device)[:, None, None]
    too_small = scales < _NVFP4_MIN_SCALE
    scale = scales.masked_fill_(too_small, 1.0).take(code)
    reciprocal = reciprocals.masked_fill_(too_small, 1.0).take(code)
    return round_e2m1_(magnitude.mul_(reciprocal)).mul_(scale).copysign_(blocks).reshape(shape)


def _nvfp4_grid(global_amax: Tensor) -> tuple[Tensor, Tensor]:
    """All block scales that there can be, by their E4M3 codes, and their reciprocals: ``[n, 256]`` for ``n`` ranges."""
    # Not a division: on CUDA, PyTorch divides by a Python number by multiplying with its reciprocal.
    global_scale = (global_amax.float() * (1.0 / (_E2M1_MAX * _E4M3_MAX))).clamp(max=FP32_MAX)
    global_scale = torch.where(global_scale <= 0.0, _NVFP4_MIN_GLOBAL_SCALE, global_scale)
    # An E4M3 code has few values: every scale and its reciprocal are made once, then taken by the blocks' codes.
    codes = torch.arange(256, dtype=torch.uint8, device=global_amax.device)
    scales = codes.view(torch.float8_e4m3fn).float() * global_scale[:, None]
    return scales, device_reciprocal(scales)


def _nvfp4_code(amax: Tensor, reciprocals: Tensor) -> Tensor:
    """E4M3 codes of blocks ``[n, ...]`` with these ranges under ``n`` grids, int64."""
    # Neither 0 nor infinite: so the product is NaN only if the block or the global amax is, and that is kept.
    to_e4m3 = reciprocals[:, _E4M3_CODE_OF_6].clamp(_FP32_SMALLEST, FP32_MAX)[:, None, None]
    return (amax * to_e4m3).clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).long()


def round_e2m1_(magnitude: Tensor) -> Tensor:
    """Rounds non-negative FP32 numbers in place to E2M1 (0, .5, 1, 1.5, 2, 3, 4, 6), ties to even; above 6, NaN: 6."""
    magnitude.nan_to_num_(nan=_E2M1_MAX).clamp_(max=_E2M1_MAX)
    # The spacing of E2M1 is half the power of two below the number, at least 0.5. Adding 2**23 spacings leaves the
    # FP32 sum no finer digit, so that the addition itself rounds to nearest, ties to even.
    shift = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
    shift.clamp_(min=1.0).mul_(2.0**22)
    return magnitude.add_(shift).sub_(shift)


def device_reciprocal(x: Tensor) -> Tensor:
    """Reciprocal as the GPU's ``MUFU.RCP`` gives it: within 1 ulp, not always the nearest FP32 number.

    The unit interpolates quadratically (Oberman and Siu, "A High-Performance Area-Efficient Multifunction
    Interpolator", ARITH 2005): the upper 7 bits of the mantissa select three coefficients, the lower 16 are the
    variable. ``tests/golden/fit_reciprocal.py`` finds the coefficients from an H200's reciprocals of all mantissas;
    other GPUs have not been measured.
    """
    coefficients, square = _reciprocal_tables(x.device)
    bits = x.view(torch.int32).long()
    low = bits & 0xFFFF
    c0, c1, c2 = coefficients[:, (bits >> 16) & 0x7F]
    mantissa = (c0 - c1 * low + c2 * square[low]) >> 15
    result = (((252 - (bits >> 23)) << 23) + mantissa).int().view(torch.float32)
    # The rest (zero, infinity, NaN, a subnormal argument or result) decides no rounding.
    return torch.where((x >= _FP32_TINY) & (x <= 1.0 / _FP32_TINY), result, x.reciprocal())


@functools.cache
def _reciprocal_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Coefficients ``[3, 128]`` of the interpolation and, in units of ``2**17``, the squares ``[2**16]`` in it."""
    with resources.files("layerbits").joinpath("data/gpu_reciprocal.csv").open(encoding="utf-8") as file:
        c0, c1, c2 = np.loadtxt(file, dtype=np.int64, delimiter=",", unpack=True)
    coefficients = np.stack([(c0 << 13) + _RECIPROCAL_ROUNDING, c1, c2])
    low = np.arange(2**16)
    square = np.zeros_like(low)
    # The squarer adds the products of the bits i <= j, without those that weigh less than 2**17.
    for j in range(9, 16):
        partners = low & ((1 << j) - (1 << (16 - j)))
        square += ((low >> j) & 1) * ((1 << 2 * j) + (partners << (j + 1)))
    return torch.from_numpy(coefficients).to(device), torch.from_numpy(square >> 17).to(device)


def _check(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise UserError(f"FP4 fake quantization takes float32, float16 or bfloat16, not {x.dtype}: cast the tensor")
    if x.dim() == 0:
        raise UserError("FP4 fake quantization needs a tensor with at least one dimension: reshape the scalar")


def block_size_of(inputs: Tensor, quantizer: TensorQuantizer) -> int:
    """Values in a block of the last dimension, by a quantizer's settings.

    Raises:
        UserError: Its blocks lie along another dimension.
    """
    size = quantizer.block_sizes.get(-1) or quantizer.block_sizes.get(inputs.dim() - 1)
    if size is None:
        raise UserError("FP4 quantizes blocks of the last dimension: give block_sizes the key -1")
    return int(size)


def mxfp4_entrypoint(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """What ModelOpt calls for :data:`MXFP4_BACKEND`."""
    return mxfp4(inputs, block_size_of(inputs, quantizer))


def nvfp4_entrypoint(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """What ModelOpt calls for :data:`NVFP4_BACKEND`."""
    # The calibrated amax, a pinned one, or this tensor's: ModelOpt's own choice has no public name.
    amax = quantizer._get_amax(inputs)
    return nvfp4(inputs, amax, block_size_of(inputs, quantizer), quantizer._pass_through_bwd)
