"""ModelOpt's decision groups under LayerBits' names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from layerbits.inputs.experts import fused_experts, is_routed
from layerbits.inputs.kinds import kind_by_name, kind_of, place_of
from layerbits.results.result import VISION_KINDS, Group

if TYPE_CHECKING:
    from modelopt.torch.quantization.algorithms import QuantRecipeHparam
    from torch import nn

_ONCE = frozenset(
    (
        *("qkv", "o", "gate_up", "down", "experts", "shared_gate_up", "shared_down"),
        *("linear_attn_out", "ssm_out", "conv", "lm_head", "vision_qkv", "vision_out", "vision_fc1", "vision_fc2"),
    )
)
"""Kinds that name their groups where a block has no more than one of them."""


Fused = Sequence[tuple[tuple[str, ...], int]]
"""Module names and the number of weights, per decision of a model."""


def named_groups(model: nn.Module | None, fused: Fused, head: str | None) -> tuple[Group, ...]:
    """Names the groups of a model.

    A name depends on the model alone, not on what is searched: so give all decisions of the model. A kind that occurs
    several times in a block of the same list gives way to what the group's modules are called.

    Args:
        model: The whole model; ``None`` where there are only names.
        fused: Its decisions.
        head: Module name of the output head.

    Returns:
        One group each, in the same order, with unique keys.
    """
    places = [place_of(modules[0]) for modules, _ in fused]
    known = {name for modules, _ in fused for name in modules}
    kinds = [kind_by_name(m, head, known) if model is None else kind_of(model, m, head) for m, _ in fused]
    times = Counter((place, kind) for place, kind in zip(places, kinds, strict=True))
    several = {(place.blocks, kind) for (place, kind), n in times.items() if n > 1}
    groups: list[Group] = []
    taken: Counter[tuple[str, str]] = Counter()
    for (modules, weights), place, kind in zip(fused, places, kinds, strict=True):
        short = kind if kind in _ONCE and (place.blocks, kind) not in several else _leaves(modules)
        seen = kind in VISION_KINDS  # a block of the tower is none of the decoder's
        short = f"merger.{short}" if kind == "merger" else short
        key = short if place.block is None else f"{'V' if seen else 'B'}{place.block:02d}.{short}"
        blocks = "" if kind == "merger" else place.blocks
        taken[blocks, key] += 1
        if taken[blocks, key] > 1:
            key = f"{key}.{taken[blocks, key]}"
        groups.append(Group(key, None if seen else place.block, kind, tuple(modules), weights))
    return tuple(groups)


def with_active(groups: Sequence[Group], ratio: float | None) -> tuple[Group, ...]:
    """The groups with the share of their weights that a token uses.

    Args:
        groups: From :func:`named_groups`.
        ratio: Share of the routed experts that a token uses; ``None`` where it is not known or there are none.
    """
    routed = [any(is_routed(name) for name in g.modules) for g in groups]
    return tuple(replace(g, active=ratio) if r and ratio else g for g, r in zip(groups, routed, strict=True))


def recipe_hparams(model: nn.Module) -> list[tuple[str, QuantRecipeHparam]]:
    """ModelOpt's (name, hparam) pairs, one per decision, in model order."""
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.quantization.algorithms import QuantRecipeHparam

    return [(name, h) for name, h in named_hparams(model, unique=True) if isinstance(h, QuantRecipeHparam)]


def weights_of(hparam: QuantRecipeHparam) -> int:
    """Number of weights that one ModelOpt decision covers."""
    experts = (fused_experts(module) for module in hparam.quant_modules)
    return sum(m.weight.numel() if e is None else e.weights for m, e in zip(hparam.quant_modules, experts, strict=True))


def _leaves(modules: Sequence[str]) -> str:
    return "-".join(sorted({name.rpartition(".")[2] for name in modules}))
