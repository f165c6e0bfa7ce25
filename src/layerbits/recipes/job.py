"""A recipe on a model: checked before the weights load, scored in one pass, answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.candidates.candidate import Candidate, check_target
from layerbits.candidates.capability import Capability
from layerbits.candidates.kv_cache import NO_CACHE, kv_name
from layerbits.config import Settings
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.datasets import load_dataset
from layerbits.recipes.recipe import LoadedRecipe
from layerbits.recipes.solve import solve_like_modelopt, solve_recipe
from layerbits.recipes.space import RecipeSpace, lay_out
from layerbits.results.assignment import Assignment
from layerbits.results.bootstrap import with_intervals
from layerbits.results.result import CandidateInfo, FloatArray, SensitivityResult, effective_bits
from layerbits.schemes.kv_cache import AUTO
from layerbits.schemes.solver import Solution
from layerbits.stages.plan import Held, Plan
from layerbits.stages.run import Outcome
from layerbits.stages.workbench import scored_together, workbench

if TYPE_CHECKING:
    from layerbits.inputs.models import LoadedModel


@dataclass(frozen=True)
class RecipePlan:
    """Everything that could be checked without loading the weights.

    Attributes:
        settings: As given, with the method and the score size that the recipe asks for.
        space: The recipe on the model.
        passes: One for all candidates that are scored together, and one for each that ModelOpt alone can calibrate.
        kv_cache: The KV cache of its schemes; ``auto`` where the recipe has none.
        notes: What the user should know.
        served: What was asked to be said of its candidates beforehand, a line each.
    """

    settings: Settings
    space: RecipeSpace
    passes: tuple[Plan, ...]
    kv_cache: str
    notes: tuple[str, ...]
    served: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecipeOutcome:
    """What came out of a recipe.

    Attributes:
        outcomes: A result for each candidate, on the groups that it may be chosen for.
        raw: ``[searched slots, C]`` raw scores, never clamped.
        solution: What they come to, per slot. stock: The same by ModelOpt's own solver, ``None`` for a PTQ recipe.
    """

    plan: RecipePlan
    outcomes: tuple[Outcome, ...]
    raw: FloatArray
    solution: Solution
    stock: Solution | None

    @property
    def results(self) -> dict[str, SensitivityResult]:
        """Candidate name → its result."""
        return {o.result.candidate.name: o.result for o in self.outcomes}


def plan_recipe(
    settings: Settings, recipe: LoadedRecipe, about: Callable[[CandidateInfo], Sequence[str]] | None = None
) -> RecipePlan:
    """Checks a recipe on a model before anything heavy is loaded.

    Args:
        settings: Of the run.
        recipe: The recipe.
        about: What a reader should know of a candidate beforehand, a line each: said before the pass, and in the
            report of its run.

    Raises:
        UserError: Whatever can be known to fail by now, with what to change.
    """
    from layerbits.inputs.loading import empty_model
    from layerbits.inputs.models import vision_linears

    settings, notes = _with_recipe(settings, recipe)
    cache = kv_name(recipe.cache_settings)
    if cache is None:
        notes.append(f"recipe {recipe.name}: its format of the KV cache has no name here; the schemes leave it out")
        cache = NO_CACHE
    elif cache == NO_CACHE:
        cache = AUTO  # what was priced
    bench = workbench(settings)
    empty = empty_model(bench.resolved)
    space = lay_out(recipe, empty, bench.linears)
    if settings.model.vision and not set(space.scored) & set(vision_linears(empty)):
        notes.append(
            f"recipe {recipe.name} leaves the vision tower out, so model.vision=true scores nothing of it; take the "
            "tower's patterns out of the recipe's disabled layers"
        )
    checked: dict[int, tuple[Candidate, Capability]] = {}
    served: dict[str, None] = {}
    for c, candidate in enumerate(space.candidates):
        mine = [m for slot in space.slots if c in slot.choices for m in slot.modules]
        if mine:
            capability, said = bench.check(candidate, mine), () if about is None else tuple(about(candidate.info))
            checked[c] = candidate, replace(capability, notes=(*capability.notes, *said))
            served |= dict.fromkeys(said)
    scored = sorted({c for slot in space.searched for c in slot.choices})
    for c in scored:
        check_target(space.candidates[c], settings.autoquant.effective_bits)
    held = Held({module: checked[c] for module, c in space.held.items()}, recipe.held_kv)
    together = [c for c in scored if settings.autoquant.engine != "stock" and scored_together(space.candidates[c])]
    alone = [[c] for c in scored if c not in together]
    if alone and held.identity():
        name = space.candidates[alone[0][0]].info.name
        raise Unsupported(
            f"{name} needs ModelOpt's own search, and recipe {recipe.name} keeps other linears quantized meanwhile; "
            "leave that format out, or run the recipe with hf_ptq.py"
        )
    passes = [bench.plan([checked[c] for c in part], space.scored, held) for part in [together, *alone] if part]
    return RecipePlan(settings, space, tuple(passes), cache, (*notes, *space.notes), tuple(served))


def run_recipe(plan: RecipePlan, root: Path) -> RecipeOutcome:
    """Scores a recipe's candidates and answers it.

    Args:
        plan: From :func:`plan_recipe`.
        root: Project folder, for the git commit.
    """
    from layerbits.stages.run import load_model, run

    loaded: LoadedModel = load_model(plan.passes[0])
    space = plan.space
    searched, names = space.searched, [c.info.name for c in space.candidates]
    raw = np.full((len(searched), len(names)), np.nan)
    row_of = {slot.modules: s for s, slot in enumerate(searched)}
    outcomes: dict[str, Outcome] = {}
    for part in plan.passes:
        for outcome in run(part, root, loaded):
            result = outcome.result
            name = result.candidate.name
            c = names.index(name)
            eligible = [g for g, group in enumerate(result.groups) if c in searched[row_of[group.modules]].choices]
            for g in eligible:
                raw[row_of[result.groups[g].modules], c] = result.scores[g]
            outcomes[name] = replace(outcome, result=_selected(result, eligible, space.recipe))
    solution = solve_recipe(space, raw)
    stock = None if space.recipe.effective_bits is None else solve_like_modelopt(space, np.nan_to_num(raw, nan=1e30))
    return RecipeOutcome(plan, tuple(outcomes[n] for n in names if n in outcomes), raw, solution, stock)


def _with_recipe(settings: Settings, recipe: LoadedRecipe) -> tuple[Settings, list[str]]:
    """The settings with what the recipe says of scoring; what the user says goes before it."""
    spec, notes = settings.autoquant, []
    method = spec.method
    if recipe.kind == "auto_quantize" and method == "gradient":  # the default: the recipe's own counts
        method = recipe.method
    elif recipe.kind == "auto_quantize" and method != recipe.method:
        notes.append(f"recipe {recipe.name} says method={recipe.method}; scored by method={method}, as asked for")
    if spec.kv_cache and method != "gradient":
        raise UserError(
            f"recipe {recipe.name} is scored by {method}, and autoquant.kv_cache by gradient alone; use none"
        )
    if spec.kv_cache and recipe.held_kv is not None:
        raise UserError(
            f"recipe {recipe.name} keeps keys and values quantized while it scores, so that autoquant.kv_cache would "
            "price them on top of that; use none"
        )
    samples = spec.num_score_samples
    if samples is None and recipe.score_size is not None:
        data = settings.dataset
        known = len(load_dataset(data.name, data.size, data.path, data.share).captions)
        samples = recipe.score_size if recipe.score_size < known else None  # all of them, where there are fewer
    composed = dict(settings.composed)
    composed["autoquant"] = {**composed["autoquant"], "method": method, "num_score_samples": samples or "all"}
    autoquant = replace(spec, method=method, num_score_samples=samples)
    return replace(settings, autoquant=autoquant, composed=composed), notes


def _selected(result: SensitivityResult, keep: Sequence[int], recipe: LoadedRecipe) -> SensitivityResult:
    """A result on some of its groups, as a part of a recipe."""
    tags = {**result.tags, "recipe": recipe.name, "recipe_digest": recipe.digest}
    if len(keep) == len(result.groups):
        return replace(result, tags=tags)
    rows = list(keep)
    groups = tuple(result.groups[g] for g in rows)
    kept = {group.key for group in groups}
    info, allocation = result.candidate, result.allocation
    assignment = Assignment(allocation.assignment[g] for g in rows)

    def bits(each: float) -> float:
        return effective_bits(groups, [16.0 if name is None else each for name in assignment], allocation.cost_model)

    finite = [s for s, name in zip(result.scores[rows], assignment, strict=True) if name is not None and np.isfinite(s)]
    return with_intervals(
        replace(
            result,
            groups=groups,
            scores=result.scores[rows],
            predicted_kl=result.predicted_kl[rows],
            sample_kl=None if result.sample_kl is None else result.sample_kl[:, rows],
            nonfinite=tuple(n for n in result.nonfinite if n.group in kept),
            allocation=replace(
                allocation,
                assignment=assignment,
                effective_bits=bits(info.bits),
                effective_bits_modelopt=bits(info.bits_modelopt),
                score=float(sum(finite)),
            ),
            intervals=None,
            tags=tags,
        )
    )
