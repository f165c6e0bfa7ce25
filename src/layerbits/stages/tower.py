"""A vision tower with a budget of its own in a run: which groups are quantized then."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from layerbits.results.result import costs
from layerbits.schemes.budgets import parts, solve_parts
from layerbits.stages.plan import Plan

if TYPE_CHECKING:
    from layerbits.scoring.job import Scores


def with_tower_budget(scores: Scores, plan: Plan) -> Scores:
    """Scores with what is quantized under the two budgets, solved as a scheme with ``vision_bits`` is.

    ModelOpt's search has one budget for all groups, and its solver loses differences as small as the scores of a tower
    among those of a language model.

    Args:
        scores: Solved for the budget of all groups.
        plan: What was scored; where its tower has no budget of its own, the scores stay as they are.
    """
    from layerbits.scoring.state import with_choice

    spec = plan.settings.autoquant
    if spec.vision_bits is None:
        return scores
    shared = parts([spec.effective_bits], spec.vision_bits, [group.kind for group in scores.groups])
    weights = costs(scores.groups, spec.cost_model)
    chosen, states = {}, {}
    for column, (candidate, _) in enumerate(plan.candidates):
        info = candidate.info
        (assignment,) = solve_parts(scores.raw[:, [column]], {info.name: info.bits}, weights, shared)
        flags = tuple(name is not None for name in assignment)
        chosen[info.name] = flags
        quantized = [group.modules for group, flag in zip(scores.groups, flags, strict=True) if flag]
        states[info.name] = with_choice(scores.states[info.name], quantized)
    return replace(scores, chosen=chosen, states=states)
