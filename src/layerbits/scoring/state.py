"""ModelOpt's search state for scores that were measured outside its searcher: same groups, costs and solver."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerbits.inputs.experts import fused_experts, is_routed
from layerbits.inputs.linears import is_quantizable
from layerbits.results.result import FloatArray

_ATTRS: tuple[str, ...] = ("input_quantizer", "weight_quantizer", "output_quantizer")


@dataclass(frozen=True)
class Decision:
    """Modules that ModelOpt decides on together.

    Attributes:
        name: Its key in ModelOpt's ``candidate_stats``.
        modules: Names of the linears, or of an expert module.
        weights: Number of their weights.
        searched: Whether the search may quantize them.
        attrs: Names of the quantizers of each module.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    searched: bool
    attrs: tuple[str, ...] = _ATTRS


def decisions(model: Any, unscored: Sequence[str]) -> list[Decision]:
    """Groups a model's linears and expert modules by ModelOpt's own fusion rules.

    Args:
        model: Any model, converted by ModelOpt or not.
        unscored: Name patterns that stay unquantized; a group with one such member stays as a whole.
    """
    import fnmatch

    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

    searcher = AutoQuantizeGradientSearcher()
    searcher.model = model
    grouped: dict[str, list[tuple[str, int, tuple[str, ...]]]] = {}
    for name, module in model.named_modules():
        if is_quantizable(module):
            member = name, module.weight.numel(), _ATTRS
        elif (experts := fused_experts(module)) is not None:
            quantizers = (f"{p}_{kind}_quantizer" for p in experts.projections for kind in ("input", "weight"))
            member = name, experts.weights, tuple(quantizers)
        else:
            continue
        keys = (searcher._apply_quant_group_rule(name, rule) for rule in searcher.quant_grouping_rules)
        grouped.setdefault(next((k for k in keys if k is not None), name), []).append(member)
    return [
        Decision(
            name=f"{members[0][0]}.quant_recipe",
            modules=tuple(n for n, _, _ in members),
            weights=sum(weights for _, weights, _ in members),
            searched=not any(fnmatch.fnmatch(n, pattern) for n, _, _ in members for pattern in unscored),
            attrs=members[0][2],
        )
        for members in grouped.values()
    ]


def search_state(
    method: str,
    found: Sequence[Decision],
    unscored: Sequence[str],
    name: str,
    *,
    config: Mapping[str, Any],
    raw: FloatArray,
    target_bits: float,
    active_ratio: float | None = None,
) -> dict[str, Any]:
    """The state that ``mtq.auto_quantize`` would have returned for one candidate.

    Args:
        method: ``gradient``, ``fisher`` or ``kl_div``; decides the solver (the first two share ModelOpt's for sums).
        found: All decisions of the model, in model order.
        unscored: As in :func:`decisions`.
        name: The candidate's name.
        config: Its search config, with our effective bits.
        raw: Raw score of each searched decision, in order.
        target_bits: Budget to solve.
        active_ratio: What routed experts count in ModelOpt's ``cost_model: active_moe``; ``None`` = ``weight``.

    Returns:
        A state that ``mtq.get_auto_quantize_config`` accepts, with the solver's recipe under ``best``.
    """
    from modelopt.torch.quantization.algorithms import QuantRecipe, _resolve_best_recipe

    quantized, unquantized = QuantRecipe(dict(config), name=name), QuantRecipe(None)
    scores = iter(raw.tolist())
    stats: dict[str, dict[str, Any]] = {}
    for decision in found:
        formats = [quantized, unquantized] if decision.searched else [unquantized]
        routed = active_ratio is not None and any(is_routed(n) for n in decision.modules)
        counted = float(decision.searched) * (active_ratio if active_ratio is not None and routed else 1.0)
        cost = decision.weights * counted
        stats[decision.name] = {
            "formats": formats,
            "scores": [next(scores), 0.0] if decision.searched else [0.0],
            "costs": [cost * f.compression for f in formats],
            "module_names": list(decision.modules),
            "quantizer_attrs": dict.fromkeys(decision.modules, decision.attrs),
            "cost_weight": counted,
            "allow_no_quant": True,
            "is_fixed": False,
            "uncompressed_cost": cost,
        }
    total = sum(s["uncompressed_cost"] for s in stats.values())
    state: dict[str, Any] = {
        "method": "kl_div" if method == "kl_div" else "gradient",
        "cost_model": "weight" if active_ratio is None else "active_moe",
        "cost": {"excluded_module_name_patterns": list(unscored)}
        | ({} if active_ratio is None else {"active_moe_expert_ratio": active_ratio}),
        "active_moe_expert_ratio": active_ratio,
        "cost_denominator": total,
        "fixed_quantization_config": None,
        "disabled_layers": list(unscored),
        "candidate_stats": stats,
        "quantizer_states": {},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = _resolve_best_recipe(state, {"effective_bits": target_bits})
    chosen = {n: stats[n]["formats"].index(r) for n, r in recipe.items()}
    spent = sum(stats[n]["costs"][i] for n, i in chosen.items())
    state["best"] = {
        "recipe": recipe,
        "constraints": {"effective_bits": spent / total * 16},
        "score": sum(stats[n]["scores"][i] for n, i in chosen.items()),
        "is_satisfied": spent <= total * target_bits / 16 * (1 + 1e-12),
    }
    return state
