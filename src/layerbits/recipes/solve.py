"""A recipe's answer: least score on raw scores, and what ModelOpt's own solver makes of the same scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from layerbits.recipes.space import RecipeSpace
from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment
from layerbits.results.result import FloatArray
from layerbits.schemes.solver import Solution, solve_problem
from layerbits.scoring.state import SearchState, solved_state, stats_entry

if TYPE_CHECKING:
    from modelopt.torch.quantization.algorithms import QuantRecipe


def solve_recipe(space: RecipeSpace, raw: FloatArray) -> Solution:
    """The exact optimum on raw scores; a PTQ recipe has nothing to choose.

    Args:
        space: The recipe on its model.
        raw: ``[searched slots, C]``, NaN where not finite.

    Returns:
        What each slot becomes, with its bits by ModelOpt's count and the raw score of the searched slots.

    Raises:
        UserError: Scores that are not finite leave no choice that fits the budget.
    """
    if space.recipe.effective_bits is None:
        given = [slot.choices[0] if slot.choices else UNQUANTIZED for slot in space.slots]
        return _solution(space, raw, Assignment.at(given, space.names))
    solution = solve_problem(space.problem(raw), space.recipe.effective_bits)
    return _solution(space, raw, solution.assignment)


def solve_like_modelopt(space: RecipeSpace, raw: FloatArray) -> Solution:
    """What ``mtq.auto_quantize`` chooses given these scores: clamped as it clamps them, by its own solver."""
    chosen, named = search_state(space, raw)["best"]["recipe"], _recipes(space)
    choice = [next((c for c in slot.choices if named[c] == chosen[slot.name]), UNQUANTIZED) for slot in space.slots]
    return _solution(space, raw, Assignment.at(choice, space.names))


def clamped_scores(space: RecipeSpace, raw: FloatArray) -> int:
    """How many raw scores ModelOpt lowers to the score of a format with fewer bits."""
    changed, named = 0, _recipes(space)
    for slot, row in zip(space.searched, raw, strict=True):
        ordered = [float(row[c]) for c in sorted(slot.choices, key=lambda c: named[c])]
        changed += sum(score > min(ordered[:i]) for i, score in enumerate(ordered) if i)
    return changed


def search_state(space: RecipeSpace, raw: FloatArray) -> SearchState:
    """The state that ``mtq.auto_quantize`` returns for a recipe, solved for its budget.

    Args:
        space: The recipe on its model.
        raw: ``[searched slots, C]``.

    Returns:
        A state that ``mtq.get_auto_quantize_config`` accepts.
    """
    from modelopt.torch.quantization.algorithms import QuantRecipe

    recipe, unquantized, named = space.recipe, QuantRecipe(None), _recipes(space)
    stats = {}
    rows = iter(raw)
    for slot in space.slots:
        scores = next(rows) if slot.searched else np.zeros(len(space.candidates))
        by_format = {named[c]: float(scores[c]) for c in slot.choices}
        if slot.allow_no_quant or not slot.choices:
            by_format[unquantized] = 0.0
        stats[slot.name] = stats_entry(
            slot.modules,
            slot.attrs,
            slot.weights,
            _clamped(by_format),
            cost_weight=slot.cost_weight,
            allow_no_quant=slot.allow_no_quant,
            is_fixed=slot.baseline,
        )
    return solved_state(
        stats,
        recipe.effective_bits or UNQUANTIZED_BITS,
        method=recipe.method,
        cost_model=recipe.cost_model,
        cost=recipe.stock_arguments()["constraints"]["cost"],
        active_ratio=recipe.cost.get("active_moe_expert_ratio"),
        disabled=recipe.disabled,
        fixed=recipe.fixed,
    )


def _clamped(scores: Mapping[QuantRecipe, float]) -> dict[QuantRecipe, float]:
    """Scores in ModelOpt's order of formats, each no larger than those before, as ModelOpt clamps them."""
    clamped, lowest = {}, float("inf")
    for form in sorted(scores):
        lowest = min(lowest, scores[form])
        clamped[form] = lowest
    return clamped


def _recipes(space: RecipeSpace) -> dict[int, QuantRecipe]:
    """ModelOpt's own objects for the candidates, by position."""
    from modelopt.torch.quantization.algorithms import QuantRecipe

    made = {}
    for i, (config, cost, candidate) in enumerate(zip(space.configs, space.costs, space.candidates, strict=True)):
        made[i] = QuantRecipe(config, name=candidate.info.name)
        if abs(made[i].compression * 16 - cost) > 1e-9:  # of a fixed part ModelOpt counts the weights alone
            made[i] = QuantRecipe({**config, "effective_bits": cost}, name=candidate.info.name)
    return made


def _solution(space: RecipeSpace, raw: FloatArray, assignment: Assignment) -> Solution:
    bits = [*space.costs, UNQUANTIZED_BITS]
    counted = [slot.weights * slot.cost_weight for slot in space.slots]
    score, rows = 0.0, iter(raw)
    choice = assignment.positions(space.names)
    for slot, at in zip(space.slots, choice, strict=True):
        if slot.searched:
            row = next(rows)
            score += float(row[at]) if at != UNQUANTIZED else 0.0
    spent = sum(n * bits[at] for n, at in zip(counted, choice, strict=True))
    return Solution(assignment, spent / sum(counted), score)
