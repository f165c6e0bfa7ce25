"""Triton source of the fused reduction; imported only where there is a GPU."""

import triton.language as tl


def row_scores(  # type: ignore
    gradient,
    quantized,
    output,
    scores,
    features,
    many,
    tokens,
    limit,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program: reads gradient and output once for all quantized outputs, writes one float32 for each."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < features
        g = tl.load(gradient + token * features + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(output + token * features + at, mask=inside, other=0.0).to(tl.float32)
        both = (row < many)[:, None] & inside[None, :]
        q = tl.load(
            quantized + token * many * features + row[:, None] * features + at[None, :], mask=both, other=0.0
        ).to(tl.float32)
        # the model's own rounding of the difference
        error = tl.where(both, (q - y[None, :]).to(output.dtype.element_ty).to(tl.float32), 0.0)
        product = tl.clamp(g[None, :] * error, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        total += product if SIGNED else product * product
    tl.store(scores + row * tokens + token, tl.sum(total, axis=1), mask=row < many)
