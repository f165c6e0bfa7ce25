"""A recipe as runs: one parent, a child per candidate, and the recipe's answers with the parent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from layerbits.config import Settings
from layerbits.jobs import Tracker, note
from layerbits.recipes.job import RecipeOutcome, RecipePlan, plan_recipe, run_recipe
from layerbits.recipes.recipe import load_recipe
from layerbits.recipes.report import markdown, record
from layerbits.recipes.schemes import recipe_schemes
from layerbits.results.result import CandidateInfo
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.report import metrics
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import combine
from layerbits.stages.write import write
from layerbits.tracking.contract import digests
from layerbits.tracking.made import Made

KIND = "recipe"


def recipe_job(settings: Settings, root: Path, about: Callable[[CandidateInfo], Sequence[str]] | None = None) -> None:
    """Reads, checks, scores, answers and logs the recipe of some settings.

    Args:
        settings: With a ``recipe``.
        root: Project folder.
        about: As of :func:`layerbits.recipes.job.plan_recipe`.

    Raises:
        UserError: Whatever is wrong with the recipe, on this model or at all.
    """
    from layerbits.scoring import distributed

    recipe = load_recipe(str(settings.recipe), settings.recipe_overrides)
    if distributed.rank() > 0:  # under torchrun the first process writes and logs, the others only score
        run_recipe(plan_recipe(settings, recipe), root)
        return
    tracker = Tracker(settings.tracking, root)
    name = f"{settings.model.name} {recipe.short_name} {settings.dataset.size}"
    tags = {"recipe": recipe.name, "recipe_digest": recipe.digest}
    with tracker.parent(name, KIND, tags) as parent:
        outcome = _scored(plan_recipe(settings, recipe, about), root)
        runs = {}
        for candidate, folder in _written(outcome).items():
            result = outcome.results[candidate]
            with tracker.run(result.run_name) as run:
                run.log_result(result, folder)
            runs[candidate] = run.run_id or str(folder)
        folder, schemes = _finish(outcome, runs)
        tags = {**note(markdown(outcome, schemes)), **digests({s.name: s.digest for s in schemes})}
        parent.log(Made(folder, _metrics(outcome, schemes), parameters(outcome), tags))


def parameters(outcome: RecipeOutcome) -> dict[str, str]:
    """What was in force, by the names of ``docs/tracking.md``."""
    space, spec = outcome.plan.space, outcome.plan.settings.autoquant
    recipe, first = space.recipe, next(iter(outcome.results.values()))
    values: dict[str, object] = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "recipe_kind": recipe.kind,
        "candidates": ",".join(c.info.name for c in space.candidates),
        "target_effective_bits": recipe.effective_bits,
        "cost_model": recipe.cost_model if recipe.kind == "auto_quantize" else None,
        "active_moe_expert_ratio": recipe.cost.get("active_moe_expert_ratio"),
        "method": spec.method,
        "model": first.model.name,
        "model_revision": first.model.revision,
        "dataset": first.calibration.dataset,
        "dataset_size": first.calibration.size,
        "score_samples": first.calibration.score_samples,
    }
    return {f"eff.{key}": str(value) for key, value in values.items() if value is not None}


def _scored(plan: RecipePlan, root: Path) -> RecipeOutcome:
    shown = dict.fromkeys((*plan.notes, *plan.served, *plan.passes[0].calibration.warnings))
    for line in shown:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    return run_recipe(plan, root)


def _written(outcome: RecipeOutcome) -> dict[str, Path]:
    settings = outcome.plan.settings
    return {o.result.candidate.name: write(o, settings) for o in outcome.outcomes}


def _finish(outcome: RecipeOutcome, runs: dict[str, str]) -> tuple[Path, list[Scheme]]:
    """Writes and prints the answers."""
    recipe = outcome.plan.space.recipe
    source = combine({runs[name]: result for name, result in outcome.results.items()})
    schemes = recipe_schemes(outcome, source)
    text = markdown(outcome, schemes)
    name = f"recipe_{source.model.name}_{recipe.short_name}"
    more = {
        "recipe/resolved.yaml": yaml.safe_dump(recipe.resolved(), sort_keys=False),
        "recipe/recipe.json": record(outcome),
        "recipe.md": text,
    }
    folder = write_schemes(outcome.plan.settings.output_root, source, schemes, name=name, more=more)
    print(f"\n{text}\nrecipe: {folder}")
    return folder, schemes


def _metrics(outcome: RecipeOutcome, schemes: list[Scheme]) -> dict[str, float]:
    space, solution = outcome.plan.space, outcome.solution
    values = metrics(schemes)
    values |= {"recipe/effective_bits": solution.bits, "recipe/score": solution.score}
    values |= {"recipe/floor": space.floor, "recipe/ceiling": space.ceiling}
    if outcome.stock is not None:
        differ = solution.assignment.differs(outcome.stock.assignment)
        values |= {"recipe/modelopt_effective_bits": outcome.stock.bits}
        values |= {"recipe/modelopt_score": outcome.stock.score, "recipe/modelopt_differs": float(differ)}
    return values
