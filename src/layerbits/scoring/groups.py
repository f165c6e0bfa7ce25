"""ModelOpt's decision groups under LayerBits' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layerbits.inputs.experts import fused_experts, is_routed
from layerbits.results.result import Group

_KIND_OF_LEAF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv"), "qkv"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "wo"), "o"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc"), "gate_up"),
    **dict.fromkeys(("down_proj", "w2", "fc2"), "down"),
}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def named_groups(fused: Sequence[tuple[tuple[str, ...], int]], head: str | None) -> tuple[Group, ...]:
    """Names groups of fused linears.

    Args:
        fused: Module names and the number of weights, per group.
        head: Module name of the output head.

    Returns:
        One group each, in the same order, with unique keys.
    """
    groups: list[Group] = []
    taken: Counter[str] = Counter()
    for modules, weights in fused:
        match = _BLOCK.search(modules[0])
        block = int(match.group(1)) if match else None
        leaves = {name.rpartition(".")[2] for name in modules}
        kinds = {_KIND_OF_LEAF.get(leaf, "other") for leaf in leaves}
        if head in modules:
            kind = short = "lm_head"
        elif len(kinds) == 1 and "other" not in kinds and ".experts." not in modules[0]:
            kind = short = kinds.pop()
        else:
            kind, short = "other", _common_stem(modules)
        key = short if block is None else f"B{block:02d}.{short}"
        taken[key] += 1
        if taken[key] > 1:
            key = f"{key}.{taken[key]}"
        groups.append(Group(key, block, kind, tuple(modules), weights))
    return tuple(groups)


def with_active(groups: Sequence[Group], ratio: float | None) -> tuple[Group, ...]:
    """The groups with the share of their weights that a token uses.

    Args:
        groups: From :func:`named_groups`.
        ratio: Share of the routed experts that a token uses; ``None`` where it is not known or there are none.
    """
    routed = [any(is_routed(name) for name in g.modules) for g in groups]
    return tuple(replace(g, active=ratio) if r and ratio else g for g, r in zip(groups, routed, strict=True))


def recipe_hparams(model: Any) -> list[tuple[str, Any]]:
    """ModelOpt's (name, hparam) pairs, one per decision, in model order."""
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.quantization.algorithms import QuantRecipeHparam

    return [(name, h) for name, h in named_hparams(model, unique=True) if isinstance(h, QuantRecipeHparam)]


def weights_of(hparam: Any) -> int:
    """Number of weights that one ModelOpt decision covers."""
    experts = (fused_experts(module) for module in hparam.quant_modules)
    return sum(m.weight.numel() if e is None else e.weights for m, e in zip(hparam.quant_modules, experts, strict=True))


def _common_stem(modules: Sequence[str]) -> str:
    if len(modules) == 1:
        return modules[0].rpartition(".")[2]
    parts = [name.split(".") for name in modules]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared[-1] if shared and not shared[-1].isdigit() else "+".join(sorted({p[-1] for p in parts}))
