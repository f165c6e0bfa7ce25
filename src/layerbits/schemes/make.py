"""Scores and a spec → schemes, with what was decided and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.errors import UserError
from layerbits.results.result import CandidateInfo, FloatArray, costs, effective_bits
from layerbits.schemes import solver
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.controls import control
from layerbits.schemes.coverage import covered_blocks, reverted
from layerbits.schemes.scheme import UNQUANTIZED_BITS, Scheme
from layerbits.schemes.solver import UNQUANTIZED, IntArray
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
        raise UserError("controls take their bits from schemes and there are none; name a scheme or set effective_bits")
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
    choices = covered(spec, source, values, solved(spec, source, values))
    notes = _notes(spec, source, candidates, values)
    schemes = []
    for budget, choice in zip(spec.effective_bits, choices, strict=True):
        how: dict[str, Any] = {
            "method": "budget",
            "target_effective_bits": budget,
            "cost_model": source.cost_model,
            "objective": spec.objective,
            "candidates": [c.name for c in candidates],
        }
        more = notes
        if spec.coverage is not None:
            blocks = covered_blocks(source.groups, values, spec.coverage, spec.coverage_order)
            how |= {"method": "coverage", "coverage": spec.coverage, "coverage_order": spec.coverage_order}
            how |= {"blocks": blocks}
            more = (*notes, _explained(spec, blocks, source)) if spec.coverage < 1 else notes
        schemes.append(_scheme(scheme_name(spec, budget), choice, columns, source, how, more))
    return schemes


def scheme_name(spec: SchemeSpec, budget: float) -> str:
    """Name of the scheme of one of a spec's budgets."""
    return spec.name if len(spec.effective_bits) == 1 else f"{spec.name}_{budget:g}"


def solved(spec: SchemeSpec, source: Source, values: FloatArray) -> list[IntArray]:
    """What the solver makes of some values.

    Args:
        spec: Its candidates and budgets.
        source: Groups and costs.
        values: ``[G, C]`` what is summed, of the spec's candidates.

    Returns:
        Per budget ``[G]`` the position among the spec's candidates, :data:`UNQUANTIZED` = none.

    Raises:
        UserError: A budget is infeasible.
    """
    candidates = [source.candidates[c] for c in source.columns(spec.candidates)]
    return [s.choice for s in solver.pareto(values, _bits(candidates), _costs(source), spec.effective_bits)]


def covered(spec: SchemeSpec, source: Source, values: FloatArray, choices: Sequence[IntArray]) -> list[IntArray]:
    """The choices of :func:`solved` less what the coverage of a spec reverts.

    Raises:
        UserError: The coverage is out of range.
    """
    if spec.coverage is None or spec.coverage >= 1:
        return list(choices)
    blocks = covered_blocks(source.groups, values, spec.coverage, spec.coverage_order)
    return [reverted(choice, source.groups, blocks) for choice in choices]


def controls_of(spec: SchemeSpec, reference: Scheme, source: Source) -> list[Scheme]:
    """Controls with the bits and candidates of a scheme, one per seed."""
    names = [c.name for c in source.candidates]
    assigned = np.array([UNQUANTIZED if n is None else names.index(n) for n in reference.assignment])
    made = []
    for seed in spec.seeds:
        choice = control(
            str(spec.control),
            assigned,
            source.groups,
            _bits(source.candidates),
            np.isfinite(source.scores),
            seed,
            source.cost_model,
        )
        how = {"method": spec.control, "reference": reference.name, "seed": seed}
        name = f"{reference.name}.{spec.name}" + (f"{seed}" if len(spec.seeds) > 1 else "")
        made.append(_scheme(name, choice, list(range(len(names))), source, how, ()))
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
    bits, weights = _bits([source.candidates[c] for c in columns]), _costs(source)
    budgets = np.linspace(solver.problem(values, bits, weights).floor, UNQUANTIZED_BITS, points).tolist()
    rows = []
    for budget, solution in zip(budgets, solver.pareto(values, bits, weights, budgets), strict=True):
        picked = solution.choice != UNQUANTIZED
        at = np.flatnonzero(picked), np.array(columns)[solution.choice[picked]]
        rows.append(
            {
                "target_bits": budget,
                "bits": solution.bits,
                "score": float(source.scores[at].sum()),
                "predicted_kl": float(source.predicted_kl[at].sum()),
                "quantized_groups": float(picked.sum()),
            }
        )
    return rows


def _scheme(
    name: str, choice: IntArray, columns: list[int], source: Source, how: Mapping[str, Any], notes: tuple[str, ...]
) -> Scheme:
    infos = [source.candidates[columns[c]] if c != UNQUANTIZED else None for c in choice]
    picked = np.flatnonzero(choice != UNQUANTIZED)
    at = picked, np.array(columns)[choice[picked]]
    weights = [g.weights for g in source.groups]
    bits = [UNQUANTIZED_BITS if info is None else info.bits for info in infos]
    saved_modelopt = sum(w * (UNQUANTIZED_BITS - i.bits_modelopt) for w, i in zip(weights, infos, strict=True) if i)
    used = {info.name for info in infos if info}
    return Scheme(
        name=name,
        source_run_ids=source.run_ids,
        model=source.model,
        calibration=source.calibration,
        groups=source.groups,
        candidates=tuple(c for c in source.candidates if c.name in used),
        assignment=tuple(info.name if info else None for info in infos),
        effective_bits=effective_bits(source.groups, bits, "weight"),
        effective_bits_active=effective_bits(source.groups, bits, "active_moe"),
        effective_bits_modelopt=None
        if source.all_weights is None
        else UNQUANTIZED_BITS - saved_modelopt / source.all_weights,
        predicted_kl=float(source.predicted_kl[at].sum()),
        score=float(source.scores[at].sum()),
        how=dict(how),
        settings=source.settings,
        notes=notes,
        kv_cache=source.kv_cache,
        kv_prices=source.kv_prices,
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
    if spec.method is not None and spec.method != source.method:
        notes.append(f"made for scores by method={spec.method}; these are by {source.method}")
    if len(source.kv_prices) > 1 and source.kv_cache == NO_CACHE:
        formats = " and ".join(source.kv_prices)
        notes.append(f"KV caches of {formats} were priced, and none is in the scheme; kv_cache=FORMAT takes one up")
    scored = source.calibration.score_samples
    if spec.score_samples is not None and spec.score_samples != scored:
        notes.append(f"made for scores on {spec.score_samples} captions; these are on {scored}")
    return tuple(notes)


def _explained(spec: SchemeSpec, blocks: Sequence[int], source: Source) -> str:
    total = len({g.block for g in source.groups if g.block is not None})
    harm, other = ("least", "most") if spec.coverage_order == "least_sensitive" else ("most", "least")
    return (
        f"coverage_order={spec.coverage_order}: of {total} blocks the {len(blocks)} with the {harm} summed score keep "
        f"their quantized groups ({', '.join(map(str, blocks))}), the rest is left unquantized; the other reading of "
        f"coverage={spec.coverage:g} is coverage_order={other}_sensitive"
    )


def _bits(candidates: Sequence[CandidateInfo]) -> list[float]:
    return [c.bits for c in candidates]


def _costs(source: Source) -> list[float]:
    return costs(source.groups, source.cost_model)
