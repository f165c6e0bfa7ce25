"""What the numbers in an exported checkpoint mean: weights as float32, inputs as a runtime rounds them.

Written from the layouts, not from ModelOpt's code that writes them:

- FP8 (E4M3) and INT8: the value times ``weight_scale``, one for the tensor or one per row.
- INT4: byte ``[i, k]`` holds rows ``2i`` (low four bits) and ``2i + 1`` of column ``k`` in two's complement;
  ``weight_scale`` is ``[rows, columns / group]``.
- FP4 (E2M1: a sign, then 0, .5, 1, 1.5, 2, 3, 4, 6): byte ``[r, j]`` holds columns ``2j`` (low) and ``2j + 1``. MXFP4:
  ``weight_scale`` is an exponent with bias 127 per 32 columns (OCP Microscaling Formats 1.0). NVFP4: E4M3 per 16
  columns, times ``weight_scale_2``.
"""

from __future__ import annotations

from typing import Any

import torch

from layerbits.checkpoint.labels import INPUT_FP8_TOKEN, INPUT_INT8, INPUT_NVFP4, Label
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import UserError

_FP8_SMALLEST_RANGE = 2.0**-24  # below it ModelOpt takes the range for 1
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def logical_shape(checkpoint: Checkpoint, module: str, label: Label) -> tuple[int, int]:
    """Rows and columns of the weight that a module's packed tensor holds."""
    rows, columns = checkpoint.entry(f"{module}.weight").shape
    return rows * label.packed[0], columns * label.packed[1]


def check_parts(checkpoint: Checkpoint, module: str, label: Label) -> None:
    """Checks that a quantized module has what its label needs, in the dtype and shape that it needs.

    Raises:
        UserError: A tensor is missing or of another dtype or shape.
    """
    rows, columns = logical_shape(checkpoint, module, label)
    expected = {
        "weight": (label.dtype, (rows // label.packed[0], columns // label.packed[1])),
        "weight_scale": (label.scale_dtype, label.scale_shape(rows, columns)),
    }
    if label.second_divisor is not None:
        expected["weight_scale_2"] = (torch.float32, ())
    if label.input_divisor is not None:
        expected["input_scale"] = (torch.float32, ())
    for part, (dtype, shape) in expected.items():
        if f"{module}.{part}" not in checkpoint:
            raise UserError(
                f"{module} is labelled {label.algo} but has no {part} in {checkpoint.folder}; export it again"
            )
        entry = checkpoint.entry(f"{module}.{part}")
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise UserError(
                f"{module}.{part} is {entry.dtype} {list(entry.shape)}, the label {label.algo} means {dtype} "
                f"{list(shape)}; export it again"
            )


def dequantize(
    checkpoint: Checkpoint, module: str, label: Label, start: int, stop: int, device: str = "cpu"
) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of a module's weight, float32 ``[stop - start, columns]``.

    Args:
        checkpoint: Where it is stored.
        module: Name of the module in the checkpoint.
        label: How it is stored.
        start: First row; even.
        stop: One past the last row.
        device: Where to compute.
    """
    packed = checkpoint.rows(f"{module}.weight", start // label.packed[0], -(-stop // label.packed[0]))
    values = _values(packed.to(device), label)
    scale = block_scales(checkpoint, module, label, start, stop).to(device)
    columns = values.shape[1]
    if scale.dim() == 2:
        return (values.reshape(len(values), scale.shape[1], -1) * scale[..., None]).reshape(-1, columns)
    return values * (scale[:, None] if scale.dim() else scale)


def block_scales(checkpoint: Checkpoint, module: str, label: Label, start: int, stop: int) -> torch.Tensor:
    """What the stored values of some rows are multiplied with: a scalar, ``[rows]`` or ``[rows, blocks]``, float32."""
    scale = checkpoint.rows(f"{module}.weight_scale", start, stop)
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127.0)
    scale = scale.float()
    return scale * checkpoint.rows(f"{module}.weight_scale_2") if label.second_divisor else scale


def quantize_input(x: Any, label: Label, input_scale: torch.Tensor | None) -> Any:
    """The input of a linear after the rounding that its label prescribes, in the dtype of ``x``.

    Of the ways to write that product and quotient in float32, the one of ModelOpt's fake quantization: in bfloat16 some
    thousandth of all inputs lies exactly between two steps, where the last bit decides.
    """
    from layerbits.candidates import fp4

    if label.arithmetic is None:
        return x
    wide = x.float()
    if label.arithmetic == INPUT_FP8_TOKEN:
        return _fp8(wide, wide.abs().amax(-1, keepdim=True)).to(x.dtype)
    assert input_scale is not None
    assert label.input_divisor is not None
    amax = input_scale.to(x.device) * label.input_divisor
    if label.arithmetic == INPUT_NVFP4:
        return fp4.nvfp4(x, amax)
    if label.arithmetic == INPUT_INT8:
        steps = torch.full_like(amax, 127.0) / amax  # not 127.0 / amax, which PyTorch makes a product
        return ((wide * steps).round().clamp(-128.0, 127.0) / steps).to(x.dtype)
    return _fp8(wide, amax).to(x.dtype)


def _fp8(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    amax = torch.where(amax > _FP8_SMALLEST_RANGE, amax, 1.0)
    # PyTorch makes a product with the reciprocal of 448.0 / amax.
    scale = torch.full_like(amax, 448.0) / amax if _kernel_divides(x, amax) else 448.0 / amax
    return (x * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * (1.0 / scale)


def _kernel_divides(x: torch.Tensor, amax: torch.Tensor) -> bool:
    """Whether ModelOpt's CUDA kernel makes the scale here, by division, and not its code in Python."""
    if not x.is_cuda or amax.squeeze().dim() > 1:
        return False
    from modelopt.torch.quantization.extensions import get_cuda_ext_fp8

    return get_cuda_ext_fp8() is not None


def _values(packed: torch.Tensor, label: Label) -> torch.Tensor:
    if label.packed == (1, 1):
        return packed.float()
    low, high = (packed & 15).long(), (packed >> 4).long()
    if label.packed == (2, 1):
        codes = torch.stack([low, high], 1).flatten(0, 1)
        return torch.where(codes > 7, codes - 16, codes).float()
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=packed.device)
    return table[torch.stack([low, high], -1).flatten(1)]
