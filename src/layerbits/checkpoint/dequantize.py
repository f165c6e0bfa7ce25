"""What the numbers in an exported checkpoint mean: weights as float32, inputs as a runtime rounds them.

Written from the layouts (:mod:`layerbits.checkpoint.layouts`), not from the code that writes them.
"""

from __future__ import annotations

import torch

from layerbits.checkpoint.label import (
    INPUT_FP8_TOKEN,
    INPUT_INT8,
    INPUT_INT8_TOKEN,
    INPUT_MXFP4,
    INPUT_MXFP8,
    INPUT_NVFP4,
    Label,
)
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import UserError

_SMALLEST_RANGE = 2.0**-24  # below it ModelOpt takes an FP8 range for 1, and an INT8 one for nothing but zeros


def logical_shape(checkpoint: Checkpoint, module: str, label: Label) -> tuple[int, int]:
    """Rows and columns of the weight that a module's packed tensor holds."""
    return label.layout.shape(checkpoint.entry(f"{module}.{label.layout.tensor}").shape)


def check_parts(checkpoint: Checkpoint, module: str, label: Label) -> None:
    """Checks that a quantized module has what its label needs, in the dtype and shape that it needs.

    Raises:
        UserError: A tensor is missing or of another dtype or shape.
    """
    layout = label.layout
    if f"{module}.{layout.tensor}" not in checkpoint:
        raise _missing(checkpoint, module, label, layout.tensor)
    rows, columns = logical_shape(checkpoint, module, label)
    expected = layout.parts(rows, columns)
    if (scale := label.input_scale) is not None:
        expected[scale.part] = (scale.torch_dtype, scale.shape(rows, columns, None))
    for part, (dtype, shape) in expected.items():
        if f"{module}.{part}" not in checkpoint:
            raise _missing(checkpoint, module, label, part)
        entry = checkpoint.entry(f"{module}.{part}")
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise UserError(
                f"{module}.{part} is {entry.dtype} {list(entry.shape)}, the label {label.algo} means {dtype} "
                f"{list(shape)}; export it again"
            )
    if layout.with_shape and checkpoint.rows(f"{module}.weight_shape").tolist() != [rows, columns]:
        raise UserError(f"{module}.weight_shape is not [{rows}, {columns}]; export it again")


def dequantize(
    checkpoint: Checkpoint, module: str, label: Label, start: int, stop: int, device: torch.device | str = "cpu"
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
    layout = label.layout
    several = layout.packed[0]
    packed = checkpoint.rows(f"{module}.{layout.tensor}", start // several, -(-stop // several))
    values = layout.unpack(packed.to(device))
    scale = block_scales(checkpoint, module, label, start, stop).to(device)
    columns = values.shape[1]
    if scale.dim() == 2:
        return (values.reshape(len(values), scale.shape[1], -1) * scale[..., None]).reshape(-1, columns)
    return values * (scale[:, None] if scale.dim() else scale)


def block_scales(checkpoint: Checkpoint, module: str, label: Label, start: int, stop: int) -> torch.Tensor:
    """What the stored values of some rows are multiplied with: a scalar, ``[rows]`` or ``[rows, blocks]``, float32."""
    layout = label.layout
    stored = f"{module}.{layout.scale.part}"
    scale = checkpoint.rows(stored) if layout.block is None else checkpoint.rows(stored, start, stop)
    factor = layout.scale.factor(scale, layout.block)
    if layout.second is None:
        return factor
    return factor * layout.second.factor(checkpoint.rows(f"{module}.{layout.second.part}"))


def quantize_input(x: torch.Tensor, label: Label, input_scale: torch.Tensor | None) -> torch.Tensor:
    """The input of a linear after the rounding that its label prescribes, in the dtype of ``x``.

    Of the ways to write that product and quotient in float32, the one of ModelOpt's fake quantization: in bfloat16 some
    thousandth of all inputs lies exactly between two steps, where the last bit decides.

    Args:
        x: The input.
        label: The linear's.
        input_scale: What is stored for a calibrated range.
    """
    from layerbits.candidates import fp4, mxfp8

    if label.arithmetic is None:
        return x
    if label.arithmetic == INPUT_MXFP4:
        return fp4.mxfp4(x)
    if label.arithmetic == INPUT_MXFP8:
        return mxfp8.mxfp8(x)
    wide = x.float()
    if label.arithmetic in (INPUT_FP8_TOKEN, INPUT_INT8_TOKEN):
        amax = wide.abs().amax(-1, keepdim=True)
    else:
        assert input_scale is not None
        assert label.input_scale is not None
        amax = label.input_scale.range(input_scale.to(x.device)).reshape(())
    if label.arithmetic == INPUT_NVFP4:
        return fp4.nvfp4(x, amax)
    rounded = _int8(wide, amax) if label.arithmetic in (INPUT_INT8, INPUT_INT8_TOKEN) else _fp8(wide, amax)
    return rounded.to(x.dtype)


def _int8(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    steps = torch.full_like(amax, 127.0) / amax  # not 127.0 / amax, which PyTorch makes a product
    steps = torch.where(amax > _SMALLEST_RANGE, steps, 0.0)
    rounded = (x * steps).round().clamp(-128.0, 127.0)
    return rounded / torch.where(steps > 0, steps, 1.0)


def _fp8(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    amax = torch.where(amax > _SMALLEST_RANGE, amax, 1.0)
    # PyTorch makes a product with the reciprocal of 448.0 / amax.
    scale = torch.full_like(amax, 448.0) / amax if _kernel_divides(x, amax) else 448.0 / amax
    return (x * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * (1.0 / scale)


def _kernel_divides(x: torch.Tensor, amax: torch.Tensor) -> bool:
    """Whether ModelOpt's CUDA kernel makes the scale here, by division, and not its code in Python."""
    if not x.is_cuda or amax.squeeze().dim() > 1:
        return False
    from modelopt.torch.quantization.extensions import get_cuda_ext_fp8

    return get_cuda_ext_fp8() is not None


def _missing(checkpoint: Checkpoint, module: str, label: Label, part: str) -> UserError:
    return UserError(f"{module} is labelled {label.algo} but has no {part} in {checkpoint.folder}; export it again")
