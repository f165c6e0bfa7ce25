"""A quantizer's setting in words, the same in tables, labels and refusals."""

from __future__ import annotations

from layerbits.candidates.bits import precision
from layerbits.candidates.fused import shares_range
from layerbits.candidates.linear import E8M0, FP4, Setting, block_lengths

SHARED = ", shared by fused linears"


def describe(cfg: Setting) -> str:
    """One quantizer's setting in words, ``-`` where it is disabled."""
    if cfg is None:
        return "-"
    if isinstance(cfg, list):
        return ", then ".join(map(describe, cfg))
    blocks, lengths = cfg.get("block_sizes") or {}, block_lengths(cfg)
    word = precision(cfg).upper()
    shared = SHARED if shares_range(cfg) else ""
    if blocks.get("scale_bits") is not None:
        prefix = "MX" if blocks["scale_bits"] == E8M0 else "NV" if cfg["num_bits"] == FP4 else ""
        stored = "" if blocks.get("type") == "dynamic" else ", ranges stored"
        stored += ", four-over-six" if blocks.get("four_over_six") else ""
        return f"{prefix}{word} per {lengths[-1]}{stored}{shared}" if lengths.get(-1) else f"{prefix}{word} {blocks}"
    dynamic = ", dynamic" if "dynamic" in (cfg.get("type"), blocks.get("type")) else ""
    return f"{word} {_grain(cfg.get('axis'), lengths)}{dynamic}{shared}"


def _grain(axis: int | tuple[int, ...] | None, lengths: dict[int, int | None]) -> str:
    if lengths == {-1: None}:
        return "per token"
    if lengths:
        return "per group of " + " x ".join(str(n) for _, n in sorted(lengths.items()))
    named: dict[object, str] = {
        None: "per tensor",
        0: "per output channel",
        1: "per input channel",
        -1: "per channel of the hidden state",
    }
    return named.get(axis, f"along axis {axis}")
