"""ModelOpt's search state for scores that were measured outside its searcher: same groups, costs and solver."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

from layerbits.inputs.experts import fused_experts, is_routed
from layerbits.inputs.linears import is_quantizable
from layerbits.results.result import FloatArray

if TYPE_CHECKING:
    from modelopt.torch.quantization.algorithms import QuantRecipe
    from torch import nn

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


class Statistics(TypedDict):
    """What ModelOpt's search knows of a decision: an entry of its ``candidate_stats``."""

    formats: list[QuantRecipe]
    scores: list[float]
    costs: list[float]
    module_names: list[str]
    quantizer_attrs: dict[str, Sequence[str]]
    cost_weight: float
    allow_no_quant: bool
    is_fixed: bool
    uncompressed_cost: float


class Best(TypedDict):
    """What ModelOpt's solver chose."""

    recipe: dict[str, QuantRecipe]
    constraints: dict[str, float]
    score: float
    is_satisfied: bool


class SearchState(TypedDict):
    """ModelOpt's search state, as ``mtq.auto_quantize`` returns it."""

    method: str
    cost_model: str
    cost: Mapping[str, object]
    active_moe_expert_ratio: float | None
    cost_denominator: float
    fixed_quantization_config: Mapping[str, object] | None
    disabled_layers: list[str]
    candidate_stats: dict[str, Statistics]
    quantizer_states: NotRequired[dict[str, object]]
    best: NotRequired[Best]


def decisions(model: nn.Module, unscored: Sequence[str]) -> list[Decision]:
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
    every: Sequence[Decision],
    unscored: Sequence[str],
    name: str,
    *,
    config: Mapping[str, object],
    raw: FloatArray,
    target_bits: float,
    active_ratio: float | None = None,
) -> SearchState:
    """The state that ``mtq.auto_quantize`` would have returned for one candidate.

    Args:
        method: ``gradient``, ``fisher`` or ``kl_div``; decides the solver (the first two share ModelOpt's for sums).
        every: All decisions of the model, in model order.
        unscored: As in :func:`decisions`.
        name: The candidate's name.
        config: Its search config, with our effective bits.
        raw: Raw score of each searched decision, in order.
        target_bits: Budget to solve.
        active_ratio: What routed experts count in ModelOpt's ``cost_model: active_moe``; ``None`` = ``weight``.

    Returns:
        A state that ``mtq.get_auto_quantize_config`` accepts, with the solver's recipe under ``best``.
    """
    from modelopt.torch.quantization.algorithms import QuantRecipe

    quantized, unquantized = QuantRecipe(dict(config), name=name), QuantRecipe(None)
    scores = iter(raw.tolist())
    stats = {}
    for decision in every:
        routed = active_ratio is not None and any(is_routed(n) for n in decision.modules)
        stats[decision.name] = stats_entry(
            decision.modules,
            decision.attrs,
            decision.weights,
            {quantized: next(scores), unquantized: 0.0} if decision.searched else {unquantized: 0.0},
            cost_weight=float(decision.searched) * (active_ratio if active_ratio is not None and routed else 1.0),
        )
    cost: dict[str, object] = {"excluded_module_name_patterns": list(unscored)}
    return solved_state(
        stats,
        target_bits,
        method="kl_div" if method == "kl_div" else "gradient",
        cost_model="weight" if active_ratio is None else "active_moe",
        cost=cost if active_ratio is None else cost | {"active_moe_expert_ratio": active_ratio},
        active_ratio=active_ratio,
        disabled=unscored,
    )


def without_quantizers(state: SearchState) -> SearchState:
    """A search state without the states of the quantizers, which are as large as the model's ranges."""
    small = state.copy()
    small.pop("quantizer_states", None)
    return small


def with_choice(state: SearchState, quantized: Collection[tuple[str, ...]]) -> SearchState:
    """A search state of one candidate with another recipe under ``best`` than ModelOpt's solver made.

    Args:
        state: The state.
        quantized: Modules of each decision that is quantized; the others stay as they are.
    """
    stats = state["candidate_stats"]
    recipe = {
        name: next(f for f in s["formats"] if (f.num_bits < 16) == (tuple(s["module_names"]) in quantized))
        for name, s in stats.items()
    }
    at = {name: stats[name]["formats"].index(form) for name, form in recipe.items()}
    spent = sum(stats[name]["costs"][i] for name, i in at.items())
    chosen = state.copy()
    chosen["best"] = {
        "recipe": recipe,
        "constraints": {"effective_bits": spent / state["cost_denominator"] * 16},
        "score": sum(stats[name]["scores"][i] for name, i in at.items()),
        "is_satisfied": True,
    }
    return chosen


def stats_entry(
    modules: Sequence[str],
    attrs: Sequence[str],
    weights: int,
    scores: Mapping[QuantRecipe, float],
    *,
    cost_weight: float,
    allow_no_quant: bool = True,
    is_fixed: bool = False,
) -> Statistics:
    """One entry of ModelOpt's ``candidate_stats``.

    Args:
        modules: What is decided on together.
        attrs: Names of the quantizers of each module.
        weights: Number of their weights.
        scores: ModelOpt's formats in its order → score.
        cost_weight: What a weight counts in the budget.
        allow_no_quant: Whether they may stay as they are.
        is_fixed: Whether a fixed configuration has decided already.
    """
    cost = weights * cost_weight
    return {
        "formats": list(scores),
        "scores": list(scores.values()),
        "costs": [cost * form.compression for form in scores],
        "module_names": list(modules),
        "quantizer_attrs": dict.fromkeys(modules, attrs),
        "cost_weight": cost_weight,
        "allow_no_quant": allow_no_quant,
        "is_fixed": is_fixed,
        "uncompressed_cost": cost,
    }


def solved_state(
    stats: dict[str, Statistics],
    target_bits: float,
    *,
    method: str,
    cost_model: str,
    cost: Mapping[str, object],
    active_ratio: float | None,
    disabled: Sequence[str],
    fixed: Mapping[str, object] | None = None,
) -> SearchState:
    """A search state of ModelOpt with what its own solver makes of the scores, under ``best``.

    Args:
        stats: A :func:`stats_entry` per decision, in model order.
        target_bits: Budget by ModelOpt's count.
        method: ModelOpt's name; decides the solver.
        cost_model: ``weight`` or ``active_moe``.
        cost: Parameters of the cost model.
        active_ratio: What routed experts count.
        disabled: Name patterns of what stays unquantized.
        fixed: Configuration of what is not searched.
    """
    from modelopt.torch.quantization.algorithms import _resolve_best_recipe

    total = sum(s["uncompressed_cost"] for s in stats.values())
    state: SearchState = {
        "method": method,
        "cost_model": cost_model,
        "cost": cost,
        "active_moe_expert_ratio": active_ratio,
        "cost_denominator": total,
        "fixed_quantization_config": fixed,
        "disabled_layers": list(disabled),
        "candidate_stats": stats,
        "quantizer_states": {},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = _resolve_best_recipe(state, {"effective_bits": target_bits})
    at = {name: stats[name]["formats"].index(form) for name, form in best.items()}
    spent = sum(stats[name]["costs"][i] for name, i in at.items())
    state["best"] = {
        "recipe": best,
        "constraints": {"effective_bits": spent / total * 16},
        "score": sum(stats[name]["scores"][i] for name, i in at.items()),
        "is_satisfied": spent <= total * target_bits / 16 * (1 + 1e-12),
    }
    return state
