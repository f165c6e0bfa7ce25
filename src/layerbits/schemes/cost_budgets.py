"""Schemes under budgets in GiB and in milliseconds, alone, together, or beside one in bits per weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment, IntArray
from layerbits.results.result import CandidateInfo, FloatArray
from layerbits.schemes import solver
from layerbits.schemes.catalog import Budget, SchemeSpec
from layerbits.schemes.sizes import GIB, Sizes
from layerbits.schemes.source import Source
from layerbits.schemes.times import MS, Times
from layerbits.schemes.within import best_within


@dataclass(frozen=True)
class _Cost:
    """Bytes or seconds of the choices, on the scale of bits per weight: the solver's tolerances are made for that.

    Attributes:
        key: What the user calls the budget.
        unit: What it is counted in.
        per_unit: Bytes or seconds of one.
        costs: ``[G, K]``, unquantized last, which sums to 16.
        eligible: ``[G, K]`` whether a choice can be exported and run.
        scale: Bytes or seconds of one on the scale of bits.
        fixed: Of what no choice changes, the KV cache included.
        kv_cache: Bytes of the KV cache among these.
    """

    key: str
    unit: str
    per_unit: float
    costs: FloatArray
    eligible: np.ndarray
    scale: float
    fixed: float
    kv_cache: int = 0

    @classmethod
    def of_sizes(cls, sizes: Sizes, columns: Sequence[int]) -> _Cost:
        """Bytes, for some candidates."""
        costs, rest = sizes.costs(columns)
        return cls("budget_gib", "GiB", GIB, *_scaled(costs), float(rest + sizes.kv_cache), sizes.kv_cache)

    @classmethod
    def of_times(cls, times: Times, columns: Sequence[int]) -> _Cost:
        """Seconds, for some candidates."""
        return cls("budget_ms", "ms", MS, *_scaled(times.costs(columns)), times.rest)

    def budget(self, amount: float) -> float:
        """What is left for the choices, on their scale."""
        return (amount * self.per_unit - self.fixed) / self.scale

    def amount(self, spent: float) -> float:
        """Everything, in the user's unit."""
        return (spent * self.scale + self.fixed) / self.per_unit

    def check(self, stated: solver.Problem, amount: float) -> None:
        """Checks a budget.

        Raises:
            UserError: It is below what any choice takes.
        """
        floor = solver.Problem(stated.candidates, stated.scores, self.costs).floor
        if floor > self.budget(amount) + solver.TOLERANCE:
            cache = f", {self.kv_cache / self.per_unit:.4g} {self.unit} of that the KV cache" if self.kv_cache else ""
            raise UserError(
                f"{self.key}={amount:g} cannot be reached: the least is {self.amount(floor):.4g} {self.unit} "
                f"({self.fixed / self.per_unit:.4g} {self.unit} whatever is chosen{cache}); choose more"
            )


@dataclass(frozen=True)
class Limit:
    """One of the budgets that hold together.

    Attributes:
        words: As the user wrote it.
        costs: ``[G, K]``.
        most: Their sum at most.
        cost: What it counts; ``None`` = bits.
    """

    words: str
    costs: FloatArray
    most: float
    cost: _Cost | None = None


def solved_in_costs(
    source: Source, columns: Sequence[int], stated: solver.Problem, budgets: Sequence[Budget]
) -> list[Assignment]:
    """The assignment of least score sum under each budget.

    Args:
        source: With its sizes, times, or both, as the budgets count them.
        columns: Positions of the candidates.
        stated: Their scores and bits.
        budgets: In GiB, ms, or both, and bits.

    Raises:
        UserError: A budget is below what any choice takes; the floor is named in its unit.
    """
    assignments = []
    for problem, limits in limits_of(source, columns, stated, budgets):
        at = _choice(problem, limits)
        names = np.where(at == len(stated.candidates), UNQUANTIZED, at).tolist()
        assignments.append(Assignment.at(names, stated.candidates))
    return assignments


def limits_of(
    source: Source, columns: Sequence[int], stated: solver.Problem, budgets: Sequence[Budget]
) -> list[tuple[solver.Problem, list[Limit]]]:
    """What each budget limits, and the problem with the choices that it can count.

    Args:
        source: As of :func:`solved_in_costs`, and likewise the others.
        columns: Positions of the candidates.
        stated: Their scores and bits.
        budgets: The budgets.

    Raises:
        UserError: A budget is below what any choice takes; the floor is named in its unit.
    """
    size = None if source.sizes is None else _Cost.of_sizes(source.sizes, columns)
    time = None if source.times is None else _Cost.of_times(source.times, columns)
    found = []
    for budget in budgets:
        asked = [
            (cost, amount)
            for cost, amount in ((size, budget.gib), (time, budget.ms))
            if cost is not None and amount is not None
        ]
        found.append(_limited(stated, budget.bits, asked))
    return found


def not_counted(spec: SchemeSpec, source: Source, candidates: Sequence[CandidateInfo]) -> list[str]:
    """A note for each candidate that the budgets of a spec in GiB or ms cannot count."""
    notes = []
    if spec.budget_gib and source.sizes is not None:
        names = source.sizes.missing([source.candidates.index(c) for c in candidates])
        notes += [f"{n} cannot be exported, so its bytes are not known: not eligible under budget_gib" for n in names]
    if spec.budget_ms and source.times is not None:
        refused = source.times.refused
        notes += [f"{c.name}: {refused[c.name]}: not eligible under budget_ms" for c in candidates if c.name in refused]
    return notes


def _scaled(costs: FloatArray) -> tuple[FloatArray, np.ndarray, float]:
    """Costs on the scale of bits, what is eligible, and the scale."""
    eligible = np.isfinite(costs)
    scale = float(costs[:, -1].sum()) / UNQUANTIZED_BITS
    return np.where(eligible, costs, costs[:, -1:]) / scale, eligible, scale


def _limited(
    stated: solver.Problem, bits: float | None, asked: Sequence[tuple[_Cost, float]]
) -> tuple[solver.Problem, list[Limit]]:
    scores = stated.scores
    for cost, _ in asked:
        scores = np.where(cost.eligible, scores, np.inf)
    stated = solver.Problem(stated.candidates, scores, stated.bits)
    for cost, amount in asked:
        cost.check(stated, amount)
    limits = [Limit(f"{cost.key}={amount:g}", cost.costs, cost.budget(amount), cost) for cost, amount in asked]
    if bits is not None:
        solver.check(stated, bits)
        limits.insert(0, Limit(f"effective_bits={bits:g}", stated.bits, bits))
    return stated, limits


def _choice(stated: solver.Problem, limits: Sequence[Limit]) -> IntArray:
    if len(limits) == 1:
        return solver.best_choice(solver.Problem(stated.candidates, stated.scores, limits[0].costs), limits[0].most)
    choice = best_within(stated.scores, [one.costs for one in limits], [one.most for one in limits])
    if choice is None:
        raise UserError(_apart(stated, limits))
    return choice


def _apart(stated: solver.Problem, limits: Sequence[Limit]) -> str:
    """Why budgets exclude each other: what is the least of the last one under the others."""
    *others, last = limits
    assert last.cost is not None
    amounts = np.where(np.isfinite(stated.scores), last.costs, np.inf)
    if len(others) == 1:
        least: IntArray | None = solver.best_choice(
            solver.Problem(stated.candidates, amounts, others[0].costs), others[0].most
        )
    else:
        least = best_within(amounts, [one.costs for one in others], [one.most for one in others])
    if least is None:
        return _apart(stated, others)
    spent = float(last.costs[np.arange(len(least)), least].sum())
    words = " and ".join(one.words for one in others)
    return (
        f"{words} and {last.words} cannot be reached together: under {words} the least is "
        f"{last.cost.amount(spent):.4g} {last.cost.unit}; choose more of one of them"
    )
