"""What the solver makes of some values under budgets of any kind: exactly, or near that and of many values at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerbits.results.assignment import UNQUANTIZED, Assignment, IntArray
from layerbits.results.result import FloatArray, costs
from layerbits.schemes import solver
from layerbits.schemes.budgets import Part, parts, solve_parts
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.cost_budgets import limits_of, solved_in_costs
from layerbits.schemes.source import Source
from layerbits.schemes.within import weighed


def solved(spec: SchemeSpec, source: Source, values: FloatArray) -> list[Assignment]:
    """What the solver makes of some values.

    Args:
        spec: Its candidates and budgets.
        source: Groups and costs.
        values: ``[G, C]`` what is summed, of the spec's candidates.

    Returns:
        The assignment of each budget, before its coverage leaves blocks unquantized.

    Raises:
        UserError: A budget is infeasible.
    """
    columns = source.columns(spec.candidates)
    bits, weights = stored_bits(source, columns), costs(source.groups, source.cost_model)
    if spec.in_costs:
        return solved_in_costs(source, columns, solver.problem(values, bits, weights), spec.budgets)
    return solve_parts(values, bits, weights, _parts(spec, source))


@dataclass(frozen=True)
class Limited:
    """Groups that share a limit.

    Attributes:
        at: Their positions.
        costs: ``[g, K]`` what each choice adds, unquantized last.
        most: What the sum may be.
    """

    at: IntArray
    costs: FloatArray
    most: float


@dataclass(frozen=True)
class Relaxed:
    """The relaxed problem of one budget, for many values at once.

    Attributes:
        parts: What is solved apart.
        eligible: ``[G, C]`` whether a choice can be counted.
    """

    parts: tuple[Limited, ...]
    eligible: np.ndarray

    def choices(self, values: FloatArray) -> IntArray:
        """Choices near the optimum: each group's cheapest at the least multiplier that fits.

        Args:
            values: ``[n, G, C]`` what is summed; a candidate is not eligible where that is not finite.

        Returns:
            ``[n, G]`` position of the candidate, :data:`UNQUANTIZED` = none.
        """
        values = np.where(self.eligible, values, np.nan)
        at = np.full(values.shape[:2], UNQUANTIZED)
        for part in self.parts:
            at[:, part.at] = solver.relaxed(values[:, part.at], part.costs, part.most)
        return at


def relaxed(spec: SchemeSpec, source: Source, values: FloatArray) -> list[Relaxed]:
    """The relaxed problem of each budget of a spec.

    Budgets that hold together are one limit: their costs in the proportion in which the optimum for ``values`` pays
    for them.

    Args:
        spec: Its candidates and budgets.
        source: Groups and costs.
        values: ``[G, C]`` what is summed, as :func:`solved` takes it.

    Raises:
        UserError: A budget is infeasible.
    """
    columns = source.columns(spec.candidates)
    bits, weights = stored_bits(source, columns), np.asarray(costs(source.groups, source.cost_model))
    if not spec.in_costs:
        every = np.ones(values.shape, dtype=bool)
        stated = [
            (part, solver.problem(values[part.at], bits, weights[part.at].tolist()).bits)
            for part in _parts(spec, source)
        ]
        return [
            Relaxed(tuple(Limited(part.at, each, part.budgets[budget]) for part, each in stated), every)
            for budget in range(len(spec.budgets))
        ]
    whole = np.arange(len(source.groups))
    found = []
    for problem, limits in limits_of(source, columns, solver.problem(values, bits, weights.tolist()), spec.budgets):
        together = weighed(problem.scores, [one.costs for one in limits], [one.most for one in limits])
        found.append(Relaxed((Limited(whole, *together),), np.isfinite(problem.scores[:, :-1])))
    return found


def _parts(spec: SchemeSpec, source: Source) -> list[Part]:
    return parts(spec.effective_bits, spec.vision_bits, [group.kind for group in source.groups])


def stored_bits(source: Source, columns: Sequence[int]) -> dict[str, float]:
    """Name of each candidate → weight storage bits per weight.

    Args:
        source: Its candidates.
        columns: Which of them.
    """
    return {source.candidates[c].name: source.candidates[c].bits for c in columns}
