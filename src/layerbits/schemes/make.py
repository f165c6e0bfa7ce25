"""Scores and a spec → schemes, with what was decided and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.errors import UserError
from layerbits.results.assignment import UNQUANTIZED_BITS, Assignment
from layerbits.results.result import CandidateInfo, FloatArray, bits_apart, costs, effective_bits
from layerbits.schemes import solver
from layerbits.schemes.catalog import CONTROLS_ALONE, Budget, SchemeSpec
from layerbits.schemes.controls import control
from layerbits.schemes.cost_budgets import not_counted
from layerbits.schemes.coverage import covered_blocks
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.solved import solved, stored_bits
from layerbits.schemes.source import Source


def make_schemes(specs: Sequence[SchemeSpec], source: Source) -> list[Scheme]:
    """Makes every scheme that is asked for, and the controls of each.

    Args:
        specs: Controls are made for the schemes of all other specs.
        source: The scores.

    Returns:
        Schemes in the order of the specs, then the controls, scheme by scheme.

    Raises:
        UserError: A candidate is not scored, a budget is infeasible, or two schemes have one name.
    """
    schemes = [scheme for spec in specs if spec.control is None for scheme in from_scores(spec, source)]
    controls = [spec for spec in specs if spec.control is not None]
    if controls and not schemes:
        raise UserError(CONTROLS_ALONE)
    made = [*schemes, *(c for scheme in schemes for spec in controls for c in controls_of(spec, scheme, source))]
    names = [scheme.name for scheme in made]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"two schemes are called {', '.join(twice)}; give each its own name")
    return made


def from_scores(spec: SchemeSpec, source: Source) -> list[Scheme]:
    """Solves the budgets of one spec and keeps its share of the blocks.

    Raises:
        UserError: A candidate is not scored, a budget is infeasible, or the coverage is out of range.
    """
    columns = source.columns(spec.candidates)
    candidates = [source.candidates[c] for c in columns]
    values = (source.scores if spec.objective == "score" else source.predicted_kl)[:, columns]
    notes = _notes(spec, source, candidates, values)
    schemes = []
    for budget, assignment in zip(spec.budgets, solved(spec, source, values), strict=True):
        how: dict[str, object] = {
            "method": "budget",
            **({} if budget.bits is None else {"target_effective_bits": budget.bits}),
            **({} if budget.gib is None else {"target_gib": budget.gib}),
            **({} if budget.ms is None else {"target_ms": budget.ms}),
            "cost_model": source.cost_model,
            "objective": spec.objective,
            "candidates": [c.name for c in candidates],
        }
        how |= {} if spec.vision_bits is None else {"vision_bits": spec.vision_bits}
        more = notes
        if spec.coverage is not None:
            blocks = covered_blocks(source.groups, values, spec.coverage, spec.coverage_order)
            assignment = assignment.within(source.groups, blocks) if spec.coverage < 1 else assignment
            how |= {"method": "coverage", "coverage": spec.coverage, "coverage_order": spec.coverage_order}
            how |= {"blocks": blocks}
            more = (*notes, _explained(spec, blocks, source)) if spec.coverage < 1 else notes
        if spec.vision_bits is not None:
            more = (*more, _apart(spec.vision_bits, budget, assignment, source))
        schemes.append(scheme_of(scheme_name(spec, budget), assignment, source, how, more))
    return schemes


def scheme_name(spec: SchemeSpec, budget: Budget) -> str:
    """Name of the scheme of one of a spec's budgets."""
    return spec.name if len(spec.budgets) == 1 else f"{spec.name}_{budget.name}"


def controls_of(spec: SchemeSpec, reference: Scheme, source: Source) -> list[Scheme]:
    """Controls with the bits and candidates of a scheme, one per seed."""
    made = []
    for seed in spec.seeds:
        assignment = control(
            str(spec.control),
            reference.assignment,
            source.groups,
            source.candidates,
            np.isfinite(source.scores),
            seed,
            source.cost_model,
        )
        how = {"method": spec.control, "reference": reference.name, "seed": seed}
        name = f"{reference.name}.{spec.name}" + (f"{seed}" if len(spec.seeds) > 1 else "")
        made.append(scheme_of(name, assignment, source, how))
    return made


def curve(spec: SchemeSpec, source: Source, points: int) -> list[dict[str, float]]:
    """The Pareto curve: what the least score is for each of evenly spaced budgets from the floor to 16.

    Args:
        spec: Its candidates and objective count, its budgets do not.
        source: The scores.
        points: Number of budgets.

    Returns:
        Per budget: ``target_bits``, ``bits``, ``score``, ``predicted_kl``, ``quantized_groups``.
    """
    columns = source.columns(spec.candidates)
    values = (source.scores if spec.objective == "score" else source.predicted_kl)[:, columns]
    bits, weights = stored_bits(source, columns), costs(source.groups, source.cost_model)
    budgets = np.linspace(solver.problem(values, bits, weights).floor, UNQUANTIZED_BITS, points).tolist()
    rows: list[dict[str, float]] = []
    for budget, solution in zip(budgets, solver.pareto(values, bits, weights, budgets), strict=True):
        at = source.scored(solution.assignment)
        counted = source.counted(solution.assignment)
        amounts: dict[str, float] = {key: counted[key] for key in ("gib", "ms") if key in counted}
        rows.append(
            {
                **amounts,
                "target_bits": budget,
                "bits": solution.bits,
                "score": float(source.scores[at].sum()),
                "predicted_kl": float(source.predicted_kl[at].sum()),
                "quantized_groups": float(solution.assignment.quantized),
            }
        )
    return rows


def scheme_of(
    name: str, assignment: Assignment, source: Source, how: Mapping[str, object], notes: tuple[str, ...] = ()
) -> Scheme:
    """An assignment of a source's groups as a scheme, with its bits and the sums of its scores.

    Args:
        name: Of the scheme.
        assignment: ``[G]``.
        source: The scores.
        how: What it was made by, as :attr:`Scheme.how`.
        notes: What a reader should know, a line each.
    """
    by_name = {c.name: c for c in source.candidates}
    infos = [None if candidate is None else by_name[candidate] for candidate in assignment]
    at = source.scored(assignment)
    weights = [g.weights for g in source.groups]
    bits = [UNQUANTIZED_BITS if info is None else info.bits for info in infos]
    saved_modelopt = sum(w * (UNQUANTIZED_BITS - i.bits_modelopt) for w, i in zip(weights, infos, strict=True) if i)
    return Scheme(
        name=name,
        source_run_ids=source.run_ids,
        model=source.model,
        calibration=source.calibration,
        groups=source.groups,
        candidates=tuple(c for c in source.candidates if c.name in assignment.used),
        assignment=assignment,
        effective_bits=effective_bits(source.groups, bits, "weight"),
        effective_bits_active=effective_bits(source.groups, bits, "active_moe"),
        effective_bits_modelopt=None
        if source.all_weights is None
        else UNQUANTIZED_BITS - saved_modelopt / source.all_weights,
        predicted_kl=float(source.predicted_kl[at].sum()),
        score=float(source.scores[at].sum()),
        how={**how, **source.timed_on},
        settings=source.settings,
        notes=notes,
        kv_cache=source.kv_cache,
        kv_prices=source.kv_prices,
        size=source.counted(assignment),
    )


def _notes(
    spec: SchemeSpec, source: Source, candidates: Sequence[CandidateInfo], values: FloatArray
) -> tuple[str, ...]:
    notes = []
    for column, info in zip(values.T, candidates, strict=True):
        bad = [g.key for g, value in zip(source.groups, column, strict=True) if not math.isfinite(value)]
        if bad:
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            notes.append(f"{info.name} has no finite score for {shown}: not eligible there")
    notes += not_counted(spec, source, candidates)
    if spec.method is not None and spec.method != source.method:
        notes.append(f"made for scores by method={spec.method}; these are by {source.method}")
    if len(source.kv_prices) > 1 and source.kv_cache == NO_CACHE:
        formats = " and ".join(source.kv_prices)
        notes.append(f"KV caches of {formats} were priced, and none is in the scheme; kv_cache=FORMAT takes one up")
    scored = source.calibration.score_samples
    if spec.score_samples is not None and spec.score_samples != scored:
        notes.append(f"made for scores on {spec.score_samples} captions; these are on {scored}")
    return tuple(notes)


def _apart(vision_bits: float, budget: Budget, assignment: Assignment, source: Source) -> str:
    by_name = {c.name: c.bits for c in source.candidates}
    bits = [UNQUANTIZED_BITS if name is None else by_name[name] for name in assignment]
    rest, tower = bits_apart(source.groups, bits, source.cost_model)
    return (
        f"effective_bits={budget.bits:g} is over all but the vision tower and vision_bits={vision_bits:g} over the "
        f"tower (they take {rest:.3f} and {tower:.3f}); bits are over all groups"
    )


def _explained(spec: SchemeSpec, blocks: Sequence[int], source: Source) -> str:
    total = len({g.block for g in source.groups if g.block is not None})
    harm, other = ("least", "most") if spec.coverage_order == "least_sensitive" else ("most", "least")
    return (
        f"coverage_order={spec.coverage_order}: of {total} blocks the {len(blocks)} with the {harm} summed score keep "
        f"their quantized groups ({', '.join(map(str, blocks))}), the rest is left unquantized; the other reading of "
        f"coverage={spec.coverage:g} is coverage_order={other}_sensitive"
    )
