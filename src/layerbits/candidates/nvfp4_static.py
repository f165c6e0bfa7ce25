"""NVFP4 with stored block ranges in plain PyTorch, as ModelOpt's Triton kernels compute it, and the search for them.

A weight's blocks have ranges that calibration chose (``max``, the ``mse`` sweep over FP8 scales, four-over-six), and
its scales are those ranges over 6, rounded to E4M3 under one scale per group of fused linears. The arithmetic follows
``fp4_kernel.py`` (``compute_fp4_scales``, ``static_blockwise_fp4_fake_quant``), ``tensor_quant_gpu_fp8.cu`` and
``nvfp4_fp8_sweep.py``; on CUDA, PyTorch divides by a Python number by multiplying with its reciprocal, and Triton's
``/`` is a product with the hardware's reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerbits.candidates import fp4

FP8_MAX = 448.0
FP8_MAX_FOUR_OVER_SIX = 256.0
"""What the largest block scale is normalised to in four-over-six mode: room for scales half as large again."""

_SIXTH = 1.0 / 6.0
_SMALL = 2.0**-24
_AT_ONCE = 1 << 16  # blocks: 4 MB in float32, near a CPU's caches


def block_scales(amax: Tensor, global_amax: Tensor, fp8_max: float = FP8_MAX) -> Tensor:
    """Scales of blocks by their ranges: ``amax / 6``, rounded to E4M3 under the range of all.

    Args:
        amax: Ranges, any shape.
        global_amax: Range that the scale of scales is made for, one number.
        fp8_max: :data:`FP8_MAX` or :data:`FP8_MAX_FOUR_OVER_SIX`.

    Returns:
        float32 of the shape of ``amax``.
    """
    top = global_amax.float() * (FP8_MAX / fp8_max) * _SIXTH
    top = torch.where(top <= _SMALL, torch.ones_like(top), top)
    up = FP8_MAX / top.double()  # correctly rounded, where Python's number over a tensor is two roundings
    up = up.float()
    down = torch.ones_like(up) / up
    scaled = (amax.float() * _SIXTH * up).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).float() * down


def nvfp4_static(x: Tensor, amax: Tensor, global_amax: Tensor, fp8_max: float = FP8_MAX) -> Tensor:
    """Fake-quantizes blocks to E2M1 values under stored ranges.

    Args:
        x: ``[..., n]`` float32, float16 or bfloat16; blocks of equal size follow each other.
        amax: A range per block, as many as there are blocks.
        global_amax: As in :func:`block_scales`.
        fp8_max: As in :func:`block_scales`.

    Returns:
        Tensor of the shape and dtype of ``x``.
    """
    scale = block_scales(amax, global_amax.to(x.device), fp8_max).reshape(-1, 1)
    blocks = x.reshape(len(scale), -1).float()
    zero = scale == 0.0
    safe = scale.masked_fill(zero | scale.isinf(), 1.0)
    rounded = fp4.round_e2m1_(blocks.abs().mul_(fp4.device_reciprocal(safe))).mul_(safe)
    return rounded.masked_fill_(zero, 0.0).copysign_(blocks).reshape(x.shape).to(x.dtype)


def sweep(x: Tensor, global_amax: Tensor) -> Tensor:
    """Range of each block whose E4M3 scale leaves the least squared error, of all 126 scales.

    Args:
        x: ``[blocks, 16]`` weights.
        global_amax: Range that the scale of scales is made for, one number.

    Returns:
        float32 ``[blocks]``; of scales with equal errors the smallest.
    """
    codes = torch.arange(1, 127, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).float()
    codes *= 1.0 / FP8_MAX
    amaxes = global_amax.to(x.device).float() * codes
    scales = codes * global_amax.to(x.device).float() * _SIXTH
    reciprocals = fp4.device_reciprocal(torch.where(scales == 0.0, torch.ones_like(scales), scales))
    best = torch.empty(len(x), device=x.device)
    order = x.abs().amax(-1).float().argsort()  # neighbours then need the same few scales
    for part in order.split(_AT_ONCE):
        best[part] = amaxes[_best_of(x[part].float().abs(), scales, reciprocals)]
    return best


def _best_of(magnitude: Tensor, scales: Tensor, reciprocals: Tensor) -> Tensor:
    """Position of the best scale for each of ``[n, 16]``."""
    largest = magnitude.amax(-1)
    low, high = float(largest.min()), float(largest.max())
    losses = torch.full((len(magnitude),), torch.inf, device=magnitude.device, dtype=torch.float64)
    chosen = torch.zeros(len(magnitude), dtype=torch.long, device=magnitude.device)
    smallest = float(scales[7]) * 6.0  # below it, neighbouring E4M3 scales are further apart than an eighth
    values = scales.tolist()
    for k, (scale, reciprocal) in enumerate(zip(values, reciprocals.tolist(), strict=True)):
        # Six times the scale is less than a quarter of the largest number: clipping it costs more than rounding does.
        if low > smallest and 24.0 * scale < low:
            continue
        if k and values[k - 1] > 4.0 * high:
            break  # every number rounds to zero from here on
        rounded = fp4.round_e2m1_(magnitude * reciprocal)
        error = (magnitude.double() - rounded.double() * scale).float().double()
        loss = error.square().sum(-1)
        better = loss < losses
        losses = torch.where(better, loss, losses)
        chosen[better] = k
    return chosen


def install() -> None:
    """Makes ModelOpt compute CPU tensors here, CUDA tensors as before; a second call changes nothing.

    Quantizers with stored block ranges do not ask for a backend, so their function itself is wrapped.
    """
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    stock = tensor_quantizer.static_blockwise_fp4_fake_quant
    if getattr(stock, "layerbits", False):
        return

    def fake_quant(
        x: Tensor,
        amax: Tensor,
        global_amax: Tensor | None,
        quantize_scales: bool,
        fp8_max: float,
        dtype: torch.dtype | None,
        pass_through: bool,
    ) -> Tensor:
        if x.is_cuda:
            return stock(x, amax, global_amax, quantize_scales, fp8_max, dtype, pass_through)
        assert quantize_scales
        whole = amax.amax() if global_amax is None else global_amax
        out = nvfp4_static(x.detach(), amax, whole, fp8_max).to(dtype or x.dtype)
        return x + (out - x).detach() if x.requires_grad and pass_through else out

    fake_quant.layerbits = True  # type: ignore[attr-defined]
    tensor_quantizer.static_blockwise_fp4_fake_quant = fake_quant
