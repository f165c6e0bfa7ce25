"""Triton source of fake quantization; imported only where there is a GPU.

The arithmetic is that of ModelOpt's CUDA extensions, bit for bit but for the sign of zeros and for NaN, which stays one
here: ``tensor_quant_gpu_fp8.cu``, ``tensor_quant_gpu.cu`` and, for MXFP4, ``tensor_quant_mx.cu``.
"""

import triton.language as tl
from modelopt.torch.kernels.quantization.common.nvfp4_quant import fp4_round_magnitude


def quantize_rows(  # type: ignore
    inputs,
    outputs,
    ranges,
    rows,
    width,
    ranges_count,
    bound,
    lowest,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile a program; a row has one range, and the ranges repeat when there are more rows.

    E4M3 with ``FLOAT``, otherwise integers from ``lowest`` to ``bound``. The last tile of a row may reach beyond it.
    """
    tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    amax = tl.load(ranges + row % ranges_count, mask=row < rows, other=1.0).to(tl.float32)[:, None]
    small: tl.constexpr = 2.0**-24
    x = tl.load(inputs + at, mask=inside, other=0.0).to(tl.float32)
    if FLOAT:
        scale = tl.div_rn(tl.full([ROWS, 1], 448.0, tl.float32), tl.where(amax <= small, 1.0, amax))
        back = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), scale)
        # The cast of the CUDA extension saturates. E4M3 has eight steps to a power of two, at least 2**-9 wide: adding
        # 1.5 * 2**23 steps leaves no finer digit, so that the addition itself rounds to nearest, ties to even.
        scaled = tl.clamp(x * scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 0.015625) * 1572864.0
        value = ((scaled + shift) - shift) * back
    else:
        scale = tl.div_rn(tl.zeros([ROWS, 1], tl.float32) + bound, amax)
        # The same for steps of one; clamped before it is rounded, the bounds being integers.
        scaled = tl.clamp(x * scale, lowest, bound, propagate_nan=tl.PropagateNan.ALL)
        whole = (scaled + 12582912.0) - 12582912.0
        value = tl.where(amax < small, 0.0, tl.div_rn(whole, scale + tl.zeros([ROWS, COLUMNS], tl.float32)))
    tl.store(outputs + at, value.to(outputs.dtype.element_ty), mask=inside)


def quantize_mxfp4(  # type: ignore
    inputs,
    outputs,
    rows,
    width,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One tile a program: blocks of ``SIZE`` values, each with a power of two for its scale; the last may be short."""
    tiles = tl.cdiv(width, BLOCKS * SIZE)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * (BLOCKS * SIZE) + tl.arange(0, BLOCKS * SIZE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    tile = tl.reshape(tl.load(inputs + at, mask=inside, other=0.0).to(tl.float32), (ROWS, BLOCKS, SIZE))
    tiny: tl.constexpr = 2.0**-126  # the extension is built with --use_fast_math: smaller numbers count as zero
    magnitude = tl.abs(tile)
    magnitude = tl.where(magnitude < tiny, 0.0, magnitude)
    amax = tl.max(magnitude, axis=2, keep_dims=True)
    # ceil(log2(amax / 6)) with bias 127, from the bits: 6 = 1.5 * 2**2, so a mantissa above 1.5 carries over
    bits = tl.minimum(amax, 3.4028234663852886e38).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum(((bits + 0x3FFFFF) >> 23) - 2, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    back = tl.where(amax < 6.0 * tiny, 0.0, (exponent << 23).to(tl.float32, bitcast=True))
    value = fp4_round_magnitude(magnitude * scale) * back
    value = tl.where(tile != tile, tile, tl.where(tile >= 0, value, -value))
    tl.store(outputs + at, tl.reshape(value, (ROWS, BLOCKS * SIZE)).to(outputs.dtype.element_ty), mask=inside)
