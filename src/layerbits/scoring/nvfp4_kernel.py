"""Triton source of NVFP4 fake quantization of many tensors at once; imported only where there is a GPU."""

import triton.language as tl
from modelopt.torch.kernels.quantization.common.nvfp4_quant import fp4_round_magnitude, fp8_quantize_scale


def quantize_each(  # type: ignore
    inputs,
    outputs,
    global_scales,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One tile of one tensor a program; ModelOpt's arithmetic (``fp4_kernel_hopper.py``), a global scale per tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = tensor * rows * width + row[:, None].to(tl.int64) * width + column[None, :]
    global_scale = tl.load(global_scales + tensor)
    global_scale = tl.where(global_scale > 0.0, global_scale, 1e-12)
    tile = tl.load(inputs + at, mask=inside, other=0.0).to(tl.float32)
    tile = tl.reshape(tile, (ROWS, BLOCKS, 16))
    magnitude = tl.abs(tile)
    scale = fp8_quantize_scale(tl.max(magnitude, axis=2, keep_dims=True), global_scale)
    scale = tl.broadcast_to(tl.where(scale >= 1e-5, scale, 1.0), (ROWS, BLOCKS, 16))
    value = fp4_round_magnitude(magnitude / scale) * scale
    value = tl.reshape(tl.where(tile >= 0, value, -value), (ROWS, BLOCKS * 16))
    tl.store(outputs + at, value.to(outputs.dtype.element_ty), mask=inside)
