"""The solutions of a recipe as schemes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from layerbits.recipes.job import RecipeOutcome
from layerbits.results.assignment import Assignment
from layerbits.schemes.kv_cache import chosen_cache
from layerbits.schemes.make import scheme_of
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.solver import Solution
from layerbits.schemes.source import Source
from layerbits.scoring.groups import named_groups


def recipe_schemes(outcome: RecipeOutcome, source: Source) -> list[Scheme]:
    """The solution on raw scores and, where it is another, that of ModelOpt's own solver.

    Args:
        outcome: What came out of the recipe.
        source: The scores of its candidates.
    """
    name = outcome.plan.space.recipe.short_name.replace(" ", "_")
    whole = _with_given(outcome, source)
    schemes = [_scheme(name, outcome.solution, "raw scores", outcome, whole)]
    if outcome.stock is not None and outcome.stock.assignment != outcome.solution.assignment:
        schemes.append(_scheme(f"{name}.modelopt", outcome.stock, "ModelOpt's clamped scores", outcome, whole))
    return schemes


def _scheme(name: str, solution: Solution, solved_on: str, outcome: RecipeOutcome, whole: Source) -> Scheme:
    space = outcome.plan.space
    slots = zip(space.slots, solution.assignment, strict=True)
    assignment = Assignment(name for slot, name in slots if slot.choices)
    given = sum(slot.fixed and bool(slot.choices) for slot in space.slots)
    notes = [f"{given} groups that the recipe gives have no predicted KL"] if given else []
    how: dict[str, object] = {
        "method": "recipe",
        "recipe": space.recipe.name,
        "recipe_digest": space.recipe.digest,
        "solved_on": solved_on,
    }
    if space.recipe.effective_bits is not None:
        how |= {"target_effective_bits": space.recipe.effective_bits, "cost_model": space.recipe.cost_model}
    made = scheme_of(name, assignment, whole, how, (*outcome.plan.notes, *notes))
    # Which share of given experts a token uses is not known, so neither are the bits of active weights.
    return replace(made, effective_bits_modelopt=solution.bits, effective_bits_active=math.nan, score=solution.score)


def _with_given(outcome: RecipeOutcome, source: Source) -> Source:
    """The scores on every group that the recipe may quantize, as it names them; what it gives counts 0."""
    space = outcome.plan.space
    known = {group.modules: g for g, group in enumerate(source.groups)}
    slots = [slot for slot in space.slots if slot.choices]
    named = named_groups(None, [(slot.modules, slot.weights) for slot in slots], None)
    scores, predicted_kl = np.zeros((2, len(slots), len(space.names)))
    columns = [space.names.index(c.name) for c in source.candidates]
    groups = []
    for row, (slot, group) in enumerate(zip(slots, named, strict=True)):
        at = known.get(slot.modules)
        groups.append(group if at is None else source.groups[at])
        if at is not None:
            scores[row, columns], predicted_kl[row, columns] = source.scores[at], source.predicted_kl[at]
    return replace(
        source,
        groups=tuple(groups),
        candidates=tuple(c.info for c in space.candidates),
        scores=scores,
        predicted_kl=predicted_kl,
        sample_kl=None,
        sample_tokens=None,
        kv_cache=chosen_cache(outcome.plan.kv_cache, source.kv_prices),
    )
