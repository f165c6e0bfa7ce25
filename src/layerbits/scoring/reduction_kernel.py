"""Triton source of the fused reduction; imported only where there is a GPU."""

import triton.language as tl


def row_scores(gradient, quantized, output, scores, features, limit, BLOCK: tl.constexpr):  # type: ignore
    """One row (token) a program: reads the three tensors once, writes one float32."""
    row = tl.program_id(0).to(tl.int64) * features
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < features
        g = tl.load(gradient + row + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(quantized + row + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(output + row + at, mask=inside, other=0.0).to(tl.float32)
        error = (q - y).to(output.dtype.element_ty).to(tl.float32)  # the model's own rounding of the difference
        product = tl.minimum(
            tl.maximum(g * error, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL
        )
        total += product * product
    tl.store(scores + tl.program_id(0), tl.sum(total, axis=0))
