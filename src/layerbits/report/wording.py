"""ModelOpt quantizer settings and module names in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from layerbits.candidates.linear import INPUT, WEIGHT, read_config
from layerbits.errors import UserError
from layerbits.inputs.datasets import PICTURES, WITH_PICTURES
from layerbits.plain import JsonMapping

# Weights are [out, in], activations [batch, tokens, in].
_AXES: dict[str, dict[object, str]] = {
    WEIGHT: {0: "output channel", -2: "output channel", 1: "input channel", -1: "input channel"},
    INPUT: {2: "input channel", -1: "input channel"},
}


def config_words(config: Mapping[str, object]) -> dict[str, str]:
    """What a candidate's configuration does, in words.

    Args:
        config: ``quant_cfg`` and ``algorithm`` in plain JSON types; empty where it is not known.

    Returns:
        ``weight``, ``activation`` and ``algorithm``.
    """
    if "quant_cfg" not in config:
        return dict.fromkeys(("weight", "activation", "algorithm"), "not known")
    algorithm = config.get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    try:
        cfgs = read_config(config).cfgs
    except UserError as error:  # a configuration that another version wrote still gets its report
        return {"weight": str(error), "activation": "not known", "algorithm": str(method)}
    return {
        "weight": quantizer_words(cfgs[WEIGHT], WEIGHT),
        "activation": quantizer_words(cfgs[INPUT], INPUT),
        "algorithm": "none" if method is None else str(method),
    }


def quantizer_words(cfg: JsonMapping | Sequence[JsonMapping] | None, quantizer: str) -> str:
    """One quantizer's ``cfg`` in words, e.g. ``FP4 (E2M1), blocks of 32 with E8M0 scales, dynamic``."""
    if cfg is None:
        return "not quantized, compute dtype"
    if isinstance(cfg, Sequence):
        return ", then ".join(quantizer_words(stage, quantizer) for stage in cfg)
    blocks = cfg.get("block_sizes") or {}
    kind = blocks.get("type") or cfg.get("type") or "static"
    return f"{_number(cfg.get('num_bits', 8))}, {_scales(cfg, blocks, quantizer)}, {kind}"


def modules_words(modules: Sequence[str]) -> str:
    """Module names with what they share said once: ``model.layers.0.mlp: gate_proj, up_proj``."""
    parents = {m.rpartition(".")[0] for m in modules}
    if len(modules) < 2 or len(parents) > 1 or parents == {""}:
        return ", ".join(f"`{m}`" for m in modules)
    return f"`{parents.pop()}`: " + ", ".join(f"`{m.rpartition('.')[2]}`" for m in modules)


def stability_words(top: int, captions: int, overlap: float, needed: float) -> str:
    """How stable the top of a ranking is, and how many captions it would take.

    Args:
        top: How many of the most sensitive groups.
        captions: Captions that were scored.
        overlap: How many of them two calibrations on as many captions would have in common; NaN where not known.
        needed: Captions with which that would be all but one; may be infinite.
    """
    if math.isnan(overlap):
        return f"With no more than {top} groups there is no top {top} to be stable."
    common = f"two calibrations on {captions} captions would have {overlap:.1f} of their top {top} in common"
    if needed <= captions:
        return f"The top {top} is stable: {common}."
    if math.isinf(needed):
        return f"The top {top} is not stable, and 32 times as many captions would not make it so: {common}."
    return (
        f"With {needed - captions:.0f} more captions the top {top} would be stable ({top - 1} of {top} in common); "
        f"as it is, {common}."
    )


def _number(bits: object) -> str:
    if isinstance(bits, Sequence) and not isinstance(bits, str):
        exponent, mantissa = bits
        return f"FP{exponent + mantissa + 1} (E{exponent}M{mantissa})"
    return f"INT{bits}" if isinstance(bits, int) else str(bits)


def _scales(cfg: JsonMapping, blocks: JsonMapping, quantizer: str) -> str:
    lengths = {int(k): v for k, v in blocks.items() if str(k).lstrip("-").isdigit()}
    if lengths and None not in lengths.values():
        scale = blocks.get("scale_bits")
        stored = f"E{scale[0]}M{scale[1]}" if isinstance(scale, Sequence) else f"{scale}-bit"
        words = f"blocks of {' × '.join(str(v) for v in lengths.values())}"
        return words if scale is None else f"{words} with {stored} scales"
    # ModelOpt's axes are those that keep a scale of their own; whole-dimension blocks name those that share one.
    if lengths:
        if set(lengths) == {-1}:
            return "a scale per output channel" if quantizer == WEIGHT else "a scale per token"
        return f"a scale per slice across dimensions {sorted(lengths)}"
    axis = cfg.get("axis")
    if axis is None:
        return "a scale per tensor"
    if isinstance(axis, Sequence):
        axis = axis[0] if len(axis) == 1 else tuple(axis)
    return f"a scale per {_AXES[quantizer].get(axis, f'axis {axis}')}"


def rows_words(dataset: str, packing: str, seq_len: object) -> str:
    """How samples become rows; a chat about pictures is a row of its own length.

    Args:
        dataset: Its name.
        packing: Of captions.
        seq_len: Tokens of a row of captions, at most.
    """
    packed = f"{packing}, {seq_len} tokens each"
    if dataset not in WITH_PICTURES:
        return packed
    chats = "a chat about pictures each, never cut"
    return chats if dataset == PICTURES else f"{chats}; captions {packed}"
