"""A recipe's answers in words and as plain data."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

from layerbits.recipes.job import RecipeOutcome
from layerbits.recipes.solve import clamped_scores
from layerbits.results.assignment import Assignment
from layerbits.schemes.report import markdown as scheme_table
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.solver import Solution

_SHOWN = 12


def markdown(outcome: RecipeOutcome, schemes: Sequence[Scheme]) -> str:
    """What the recipe was, what it came to, and where ModelOpt's own solver says something else."""
    space, recipe = outcome.plan.space, outcome.plan.space.recipe
    lines = [f"## {recipe.name}", "", f"{recipe.description}", ""]
    if recipe.effective_bits is not None:
        lines.append(
            f"Budget {recipe.effective_bits:g} effective bits by ModelOpt's count ({recipe.cost_model}); feasible "
            f"{space.floor:.4g} to {space.ceiling:.4g}. {_counted(outcome, outcome.solution)}."
        )
    else:
        lines.append(f"A PTQ recipe has nothing to choose: {_counted(outcome, outcome.solution)}.")
    held = [slot for slot in space.slots if slot.fixed and slot.choices]
    if held:
        lines.append(f"{len(held)} groups are given by the recipe and were quantized while the others were scored.")
    lines += ["", scheme_table(schemes)]
    if outcome.stock is not None:
        lines += _check(outcome, outcome.stock)
    lines += [f"- {note}" for note in outcome.plan.notes]
    if outcome.plan.served:
        lines += [*([""] if lines[-1] else []), "As served:", "", *(f"- {line}" for line in outcome.plan.served)]
    return "\n".join(lines).rstrip() + "\n"


def record(outcome: RecipeOutcome) -> str:
    """Everything about each group, as JSON: choices, costs, raw scores, both answers."""
    space = outcome.plan.space
    rows, raw = [], iter(outcome.raw.tolist())
    stock = outcome.stock.assignment if outcome.stock else Assignment([None] * len(space.slots))
    for slot, mine, theirs in zip(space.slots, outcome.solution.assignment, stock, strict=True):
        scores = next(raw) if slot.searched else None
        rows.append(
            {
                "name": slot.name.removesuffix(".quant_recipe"),
                "modules": list(slot.modules),
                "weights": slot.weights,
                "cost_weight": slot.cost_weight,
                "choices": [space.candidates[c].info.name for c in slot.choices],
                "allow_no_quant": slot.allow_no_quant,
                "fixed": slot.fixed,
                "scores": scores
                and {
                    space.candidates[c].info.name: scores[c] if math.isfinite(scores[c]) else None for c in slot.choices
                },
                "chosen": mine,
                "modelopt_chosen": theirs,
            }
        )
    data = {
        "recipe": space.recipe.name,
        "digest": space.recipe.digest,
        "kind": space.recipe.kind,
        "constraints": space.recipe.stock_arguments()["constraints"] if space.recipe.effective_bits else None,
        "feasible": [space.floor, space.ceiling],
        "candidates": {
            c.info.name: {"format": c.info.format_name, "config_hash": c.info.config_hash, "modelopt_bits": cost}
            for c, cost in zip(space.candidates, space.costs, strict=True)
        },
        "effective_bits": outcome.solution.bits,
        "score": outcome.solution.score,
        "groups": rows,
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _check(outcome: RecipeOutcome, stock: Solution) -> list[str]:
    names = [slot.name.removesuffix(".quant_recipe") for slot in outcome.plan.space.slots]
    pairs = zip(names, outcome.solution.assignment, stock.assignment, strict=True)
    differ = [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]
    if not differ:
        return ["ModelOpt's own solver chooses the same formats.", ""]
    lines = [
        f"ModelOpt's own solver chooses otherwise for {len(differ)} groups: {_counted(outcome, stock)}. "
        f"{_why(outcome)}",
        "",
        "| group | on raw scores | ModelOpt's |",
        "|---|---|---|",
        *(f"| {n} | {a or '–'} | {b or '–'} |" for n, a, b in differ[:_SHOWN]),
    ]
    more = [f"| {len(differ) - _SHOWN} more | | |"] if len(differ) > _SHOWN else []
    return [*lines, *more, ""]


def _why(outcome: RecipeOutcome) -> str:
    if outcome.plan.space.recipe.method == "kl_div":
        return "For kl_div it minimises the largest score, not their sum."
    if clamped := clamped_scores(outcome.plan.space, outcome.raw):
        return f"It lowers {clamped} scores to those of formats with fewer bits, so that it takes both for alike."
    return "No score was clamped: its solver stops at tolerances that raw scores this small do not reach."


def _counted(outcome: RecipeOutcome, solution: Solution) -> str:
    slots = outcome.plan.space.slots
    chosen = Counter(name for slot, name in zip(slots, solution.assignment, strict=True) if slot.choices)
    words = ", ".join(f"{n} groups {name or 'unquantized'}" for name, n in sorted(chosen.items(), key=str))
    return f"{words}; {solution.bits:.4g} bits, raw score {solution.score:.4g}"
