"""The answers of a recipe as schemes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerbits.recipes.job import RecipeOutcome
from layerbits.recipes.solve import Answer
from layerbits.results.kv_cache import kv_sums
from layerbits.results.result import Group, SensitivityResult
from layerbits.schemes.kv_cache import chosen_cache
from layerbits.schemes.scheme import UNQUANTIZED_BITS, Scheme
from layerbits.schemes.solver import UNQUANTIZED
from layerbits.schemes.source import SETTINGS
from layerbits.scoring.groups import named_groups


def recipe_schemes(outcome: RecipeOutcome, run_ids: Sequence[str]) -> list[Scheme]:
    """The answer on raw scores and, where it is another, ModelOpt's.

    Args:
        outcome: What came out of the recipe.
        run_ids: Runs of its candidates, or their files.
    """
    name = outcome.plan.space.recipe.short_name.replace(" ", "_")
    schemes = [_scheme(outcome, outcome.found, name, run_ids, "raw scores")]
    if outcome.stock is not None and outcome.stock.choice != outcome.found.choice:
        schemes.append(_scheme(outcome, outcome.stock, f"{name}.modelopt", run_ids, "ModelOpt's clamped scores"))
    return schemes


def _scheme(outcome: RecipeOutcome, answer: Answer, name: str, run_ids: Sequence[str], scores: str) -> Scheme:
    space, results = outcome.plan.space, outcome.results
    first = next(iter(results.values()))
    groups, assignment = _groups(outcome, answer), []
    predicted = {name: dict(zip(_keys(r), r.predicted_kl, strict=True)) for name, r in results.items()}
    kl, given = 0.0, 0
    for group, at in groups:
        info = None if at == UNQUANTIZED else space.candidates[at].info
        assignment.append(None if info is None else info.name)
        if info is not None:
            found = predicted.get(info.name, {}).get(group.key)
            kl, given = kl + float(found or 0.0), given + (found is None)
    notes = [f"{given} groups that the recipe gives have no predicted KL"] if given else []
    prices = kv_sums(first.kv_cache)
    infos = {c.info.name: c.info for c in space.candidates}
    used = {name for name in assignment if name is not None}
    weights = [group.weights for group, _ in groups]
    saved = sum(
        w * (UNQUANTIZED_BITS - infos[n].bits) for w, n in zip(weights, assignment, strict=True) if n is not None
    )
    how: dict[str, Any] = {
        "method": "recipe",
        "recipe": space.recipe.name,
        "recipe_digest": space.recipe.digest,
        "solved_on": scores,
    }
    if space.recipe.effective_bits is not None:
        how |= {"target_effective_bits": space.recipe.effective_bits, "cost_model": space.recipe.cost_model}
    return Scheme(
        name=name,
        source_run_ids=tuple(run_ids),
        model=first.model,
        calibration=first.calibration,
        groups=tuple(group for group, _ in groups),
        candidates=tuple(c.info for c in space.candidates if c.info.name in used),
        assignment=tuple(assignment),
        effective_bits=UNQUANTIZED_BITS - saved / sum(weights),
        effective_bits_modelopt=answer.effective_bits,
        predicted_kl=kl,
        score=answer.score,
        how=how,
        settings={key: first.settings[key] for key in SETTINGS if key in first.settings},
        notes=(*outcome.plan.notes, *notes),
        kv_cache=chosen_cache(outcome.plan.kv_cache, prices),
        kv_prices=prices,
    )


def _groups(outcome: RecipeOutcome, answer: Answer) -> list[tuple[Group, int]]:
    """Every group that the recipe may quantize, with what it becomes; one with a score under the name it has there."""
    known = {group.modules: group for result in outcome.results.values() for group in result.groups}
    slots = [(slot, at) for slot, at in zip(outcome.plan.space.slots, answer.choice, strict=True) if slot.choices]
    named = named_groups(None, [(slot.modules, slot.weights) for slot, _ in slots], None)
    return [(known.get(slot.modules, group), at) for (slot, at), group in zip(slots, named, strict=True)]


def _keys(result: SensitivityResult) -> list[str]:
    return [group.key for group in result.groups]
