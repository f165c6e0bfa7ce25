"""Triton source of the fused divergence; imported only where there is a GPU."""

import triton.language as tl


def row_divergence(  # type: ignore
    reference, partition, logits, targets, kl, change, tokens, vocabulary, least, most, BLOCK: tl.constexpr
):
    """One row (token of one perturbation) a program: reads both rows of logits once, writes two float32."""
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    log_z = tl.load(partition + token)
    p_row = reference + token * vocabulary
    q_row = logits + row * vocabulary
    target = tl.load(targets + token)
    shift = tl.load(q_row + target).to(tl.float32) - tl.load(p_row + target).to(tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    excess = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(p_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        d = tl.load(q_row + at, mask=inside, other=0.0).to(tl.float32) - tl.where(inside, z, 0.0) - shift
        p = tl.exp(z - log_z)
        series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040))))))
        mean += p * d
        excess += p * tl.where(tl.abs(d) < 0.25, series, tl.exp(d) - 1.0 - d)
    first = tl.sum(mean, axis=0).to(tl.float64)
    whole = first + tl.sum(excess, axis=0).to(tl.float64)
    log_ratio = tl.log(1.0 + whole)
    if (whole <= least) | (whole >= most) | (whole != whole):  # float32 has lost it, or it is not a number
        top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            top = tl.maximum(top, tl.load(q_row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32))
        highest = tl.max(top, axis=0)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.exp(tl.load(q_row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) - highest)
        log_ratio = (highest + tl.log(tl.sum(total, axis=0)) - log_z - shift).to(tl.float64)
    tl.store(kl + row, (log_ratio - first).to(tl.float32))
    tl.store(change + row, log_ratio.to(tl.float32))
