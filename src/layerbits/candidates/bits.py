"""What a ModelOpt configuration gives a linear: its effective quantizer settings and the bits they store."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from layerbits.errors import UserError

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"
RANK = {WEIGHT: 2, INPUT: 3}
"""Rank of what each quantizer sees in a decoder: weights ``[out, in]``, activations ``[batch, tokens, in]``."""
FP8, FP4 = (4, 3), (2, 1)
E8M0, E4M3 = (8, 0), (4, 3)
SCALE_BITS = 16
"""Bits of a block scale that the configuration does not quantize: runtimes store it as fp16 or bf16."""

Config = dict[str, Any]
Cfg = dict[str, Any]


def weight_bits(config: Config) -> float:
    """Storage bits per weight: value bits plus block scales, from the weight quantizer alone.

    MXFP4 4 + 8/32 = 4.25, NVFP4 4 + 8/16 = 4.5, INT4 in groups of 128 with fp16 scales 4 + 16/128 = 4.125. Scales per
    tensor and per channel are not counted: 16 bits for a row of 576 weights are 0.028 bit, less for wider ones. A
    sequential quantizer (INT4, then FP8 for the matmul) stores its narrowest stage.

    Raises:
        UserError: No weight is quantized, or ``num_bits`` is a word of a custom backend.
    """
    cfg = effective_cfgs(config)[WEIGHT]
    return min(_storage_bits(stage) for stage in (cfg if isinstance(cfg, list) else [cfg]))


def modelopt_bits(config: Config) -> float:
    """ModelOpt's own figure: the minimum of ``num_bits`` (or its per-quantizer override) over weights and inputs."""
    from modelopt.torch.quantization.algorithms import estimate_quant_compression
    from modelopt.torch.quantization.config import QuantizeConfig

    entries = [{"quantizer_name": f"*{q}", "cfg": cfg} for q, cfg in effective_cfgs(config).items() if cfg is not None]
    return 16 * float(estimate_quant_compression(QuantizeConfig(quant_cfg=entries)))


def effective_cfgs(config: Config) -> dict[str, Any]:
    """What every covered linear gets: quantizer → its ``cfg`` (a list when sequential), ``None`` = disabled.

    A linear is described by which of the module patterns it matches; every combination that leaves its weight
    quantizer enabled has to come to the same setting.

    Raises:
        UserError: No weight is quantized, or linears differ.
    """
    entries = linear_entries(config)
    last_on = max((i for i, e in enumerate(entries) if e.get("enable", True) and hits(e, WEIGHT)), default=-1)
    scopes: dict[str, None] = {}
    for i, entry in enumerate(entries):
        excludes = i > last_on and entry.get("enable") is False and hits(entry, WEIGHT)
        for quantizer in (WEIGHT, INPUT):
            if not excludes and (scope := _scope(entry["quantizer_name"], quantizer)):
                scopes[scope] = None
    if len(scopes) > 10:
        raise UserError(
            f"it tells {len(scopes)} module patterns apart, 10 at most can be checked; make several formats of it"
        )
    found: list[dict[str, Any]] = []
    for choice in itertools.product((False, True), repeat=len(scopes)):
        matched = {s for s, on in zip(scopes, choice, strict=True) if on}
        outcome = {q: _outcome(entries, q, matched) for q in (WEIGHT, INPUT)}
        if outcome[WEIGHT] is not None and outcome not in found:
            found.append(outcome)
    if not found:
        raise UserError("it quantizes no weights; enable *weight_quantizer")
    if len(found) > 1:
        raise UserError(
            f"it sets linears differently by {', '.join(scopes)}, a candidate has one setting; make a format of each"
        )
    return found[0]


def hits(entry: Mapping[str, Any], quantizer: str) -> bool:
    """Whether an entry can match that quantizer of some linear."""
    return _scope(entry["quantizer_name"], quantizer) is not None


def quantizers(config: Config) -> Iterator[tuple[str, Cfg]]:
    """Every enabled quantizer of a covered linear with its cfg, the stages of a sequential one by one."""
    for quantizer, cfg in effective_cfgs(config).items():
        for stage in cfg if isinstance(cfg, list) else [cfg]:
            if stage is not None:
                yield quantizer, stage


def block_lengths(cfg: Mapping[str, Any]) -> dict[int, int | None]:
    """Dimension → block length; ``None`` = the whole dimension (per channel or token, spelled as blocks)."""
    return {k: v for k, v in (cfg.get("block_sizes") or {}).items() if isinstance(k, int)}


def is_mx(cfg: Mapping[str, Any]) -> bool:
    """Whether it is a microscaling format: E8M0 block scales computed on the fly, nothing to calibrate."""
    blocks = cfg.get("block_sizes") or {}
    return blocks.get("type") == "dynamic" and blocks.get("scale_bits") == E8M0


def precision(cfg: Any) -> str:
    """Precision word of a quantizer: ``fp4``, ``fp8``, ``int8``, …, or ``fp16`` where it is disabled."""
    if cfg is None:
        return "fp16"
    bits = (cfg[0] if isinstance(cfg, list) else cfg).get("num_bits", 8)
    if isinstance(bits, str):
        return bits
    return f"fp{sum(bits) + 1}" if isinstance(bits, tuple) else f"int{bits}"


def check_dimensions(quantizer: str, axes: Any, what: str) -> None:
    """Checks axes against the rank of what the quantizer sees; ModelOpt takes others for "per tensor" silently.

    Raises:
        UserError: Out of range, or every dimension at once.
    """
    rank = RANK[quantizer]
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -rank <= axis < rank:
            raise UserError(f"*{quantizer}: {what} {axis} is out of range for a Linear; use {-rank} to {rank - 1}")
    if what == "axis" and len({a % rank for a in axes}) == rank:
        raise UserError(f"*{quantizer}: axis {list(axes)} is one scale per value, which quantizes nothing; name fewer")


def linear_entries(config: Config) -> list[dict[str, Any]]:
    """Entries that can match a linear: those for other module classes (BatchNorm, Embedding, …) cannot."""
    return [e for e in config["quant_cfg"] if e.get("parent_class") in (None, "nn.Linear")]


@functools.lru_cache
def _scope(pattern: str, quantizer: str) -> str | None:
    """Which linears a pattern matches for that quantizer: ``""`` = every one, ``None`` = none, else its module part."""
    tail = re.split(r"[*?\]]", pattern)[-1]
    if tail.endswith(quantizer):
        module = pattern[: -len(quantizer)]
    elif quantizer.endswith(tail):
        module = pattern[: len(pattern) - len(tail)]
    else:
        return None
    return module.rstrip(".*") if module else None


def _outcome(entries: list[dict[str, Any]], quantizer: str, matched: set[str]) -> Any:
    """The cfg that a linear which matches those module patterns ends with; ``None`` = disabled."""
    enabled, cfg = True, None
    for entry in entries:
        scope = _scope(entry["quantizer_name"], quantizer)
        if scope == "" or scope in matched:
            enabled = entry.get("enable", True)
            cfg = entry.get("cfg", cfg)
    if enabled and cfg is None:
        raise UserError(
            f"it leaves {quantizer} at ModelOpt's default; start it with '*' disabled, then enable what it quantizes"
        )
    return cfg if enabled else None


def _storage_bits(cfg: Cfg) -> float:
    bits = cfg.get("num_bits", 8)
    if isinstance(bits, str):
        raise UserError(
            f"num_bits {bits!r} does not tell the storage bits; give a number of bits or (exponent, mantissa)"
        )
    value = sum(bits) + 1 if isinstance(bits, tuple) else bits
    lengths = block_lengths(cfg).values()
    if not lengths or None in lengths:
        return float(value)
    scale = cfg["block_sizes"].get("scale_bits") or SCALE_BITS
    if isinstance(scale, tuple):
        scale = 8 if scale == E8M0 else sum(scale) + 1  # E8M0 has no sign bit
    return float(value + scale / math.prod(n for n in lengths if n))
