"""Which candidate each group gets under a budget of bits: exact, by Lagrangian reduction and HiGHS (``scipy``).

The problem is a multiple-choice knapsack: minimise ``Σ s[g, c]`` over one choice ``c`` per group, unquantized included,
subject to ``Σ a[g, c] ≤ budget``, where ``a`` is a choice's share of the effective bits. Relaxing the budget with a
multiplier ``λ`` gives a lower bound and, rounded, a feasible choice. A choice whose reduced cost
``s + λ·a − min(s + λ·a)`` exceeds the gap between the two cannot be part of an optimum (Kellerer, Pferschy, Pisinger,
*Knapsack Problems*, 2004, chapter 11), so that the integer program is left with the groups near the split.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from layerbits.errors import UserError
from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment, IntArray
from layerbits.results.result import FloatArray

TOLERANCE = 1e-6
"""Bits per weight by which a choice may miss its budget: the solver's feasibility tolerance."""


@dataclass(frozen=True)
class Solution:
    """An assignment with what it costs.

    Attributes:
        assignment: What each group gets.
        bits: Weight storage bits per weight.
        score: Sum over the quantized groups.
    """

    assignment: Assignment
    bits: float
    score: float


@dataclass(frozen=True)
class Problem:
    """Scores and costs of all choices, unquantized last; ``K = C + 1``.

    Attributes:
        candidates: Their names.
        scores: ``[G, K]``; infinite where a candidate is not eligible.
        bits: ``[G, K]`` share of a choice in the effective bits of the whole.
    """

    candidates: tuple[str, ...]
    scores: FloatArray
    bits: FloatArray

    @property
    def floor(self) -> float:
        """Fewest effective bits that the eligible candidates reach."""
        return float(np.where(np.isfinite(self.scores), self.bits, np.inf).min(axis=1).sum())

    @property
    def stuck(self) -> int:
        """Groups without an eligible candidate."""
        return int((~np.isfinite(self.scores[:, :-1])).all(axis=1).sum())

    def solution(self, at: IntArray) -> Solution:
        """The solution of a choice ``[G]`` among the ``K``."""
        rows = np.arange(len(at))
        chosen = Assignment.at(np.where(at == len(self.candidates), UNQUANTIZED, at).tolist(), self.candidates)
        return Solution(chosen, float(self.bits[rows, at].sum()), float(self.scores[rows, at].sum()))


def problem(scores: FloatArray, bits: Mapping[str, float], weights: Sequence[float]) -> Problem:
    """States a problem.

    Args:
        scores: ``[G, C]``, any unit; a candidate is not eligible for a group where its score is not finite.
        bits: Candidate → weight storage bits per weight, ``C`` of them in the order of the columns.
        weights: ``[G]`` what each group counts: its number of weights, or of those that a token uses.
    """
    share = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
    padded = np.hstack([np.where(np.isfinite(scores), scores, np.inf), np.zeros((len(scores), 1))])
    return Problem(tuple(bits), padded, share[:, None] * np.array([*bits.values(), UNQUANTIZED_BITS]))


def solve_problem(stated: Problem, budget: float) -> Solution:
    """Least score sum of a stated problem under a budget of effective bits.

    Raises:
        UserError: The budget is below the feasible range.
    """
    check(stated, min(budget, UNQUANTIZED_BITS))
    return stated.solution(_solve(stated, _slopes(stated), budget))


def best_choice(stated: Problem, budget: float) -> IntArray:
    """The choice ``[G]`` among the ``K`` of least score sum; the one of least cost where none is within the budget."""
    return _solve(stated, _slopes(stated), budget)


def pareto(
    scores: FloatArray,
    bits: Mapping[str, float],
    weights: Sequence[float],
    budgets: Sequence[float],
    key: str = "effective_bits",
) -> list[Solution]:
    """Least score sum under each of some budgets.

    Args:
        scores: As :func:`problem` takes it.
        bits: Candidate → bits.
        weights: ``[G]``.
        budgets: Effective bits, at most (:data:`TOLERANCE`).
        key: What the user calls them.

    Raises:
        UserError: A budget is out of the feasible range.
    """
    stated = problem(scores, bits, weights)
    for budget in budgets:
        check(stated, budget, key)
    slopes = _slopes(stated)
    return [stated.solution(_solve(stated, slopes, budget)) for budget in budgets]


def relaxed(scores: FloatArray, costs: FloatArray, budget: float) -> IntArray:
    """Choices of many problems at once, near the optimum: each group's cheapest at the least multiplier that fits.

    Args:
        scores: ``[n, G, C]`` scores of ``n`` problems; a candidate is not eligible where its score is not finite.
        costs: ``[G, K]`` what a choice adds, unquantized last, on the scale of :attr:`Problem.bits`.
        budget: What the sum may be at most.

    Returns:
        ``[n, G]`` position of the candidate, :data:`UNQUANTIZED` = none.
    """
    padded = np.concatenate([np.where(np.isfinite(scores), scores, np.inf), np.zeros((*scores.shape[:2], 1))], axis=2)

    def cheapest(multiplier: FloatArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        at = (padded + multiplier[:, None, None] * costs).argmin(axis=2)
        return at, costs[np.arange(len(costs)), at].sum(axis=1) <= budget + TOLERANCE / 2

    saved = np.ptp(costs, axis=1)  # nothing where all choices of a group cost the same
    largest = np.where(np.isfinite(padded), padded, 0.0).max(axis=2)
    steepest = np.divide(largest, saved, out=np.zeros_like(largest), where=saved > 0)
    high = steepest.max(axis=1) * 1e3 + 1e-300
    low = high * 1e-24
    for _ in range(64):
        middle = np.sqrt(low * high)
        fits = cheapest(middle)[1]
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    at = cheapest(high)[0]
    return np.where(at == padded.shape[2] - 1, UNQUANTIZED, at).astype(np.int64)


def check(stated: Problem, budget: float, key: str = "effective_bits") -> None:
    """Checks a budget of effective bits.

    Args:
        stated: The problem.
        budget: Effective bits.
        key: What the user calls them.

    Raises:
        UserError: It is out of the feasible range.
    """
    floor = stated.floor
    if not floor - TOLERANCE <= budget <= UNQUANTIZED_BITS:
        why = f"; {stated.stuck} groups without a finite score stay unquantized" if stated.stuck else ""
        raise UserError(
            f"{key}={budget:g} cannot be reached: the feasible range is {floor:.4g} to "
            f"{UNQUANTIZED_BITS:g}{why}; choose a number between"
        )


def _slopes(stated: Problem) -> FloatArray:
    """Multipliers at which some group's cheapest choice changes, ascending: slopes of the groups' lower hulls."""
    slopes = []
    for scores, bits in zip(stated.scores, stated.bits, strict=True):
        hull: list[tuple[float, float]] = []
        for point in sorted((b, s) for b, s in zip(bits, scores, strict=True) if np.isfinite(s)):
            if hull and point[1] >= hull[-1][1]:
                continue  # more bits and no better
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
                hull.pop()
            if hull and hull[-1][0] == point[0]:
                hull.pop()
            hull.append(point)
        slopes += [_slope(a, b) for a, b in pairwise(hull)]
    return np.unique(np.array([0.0, *slopes]))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def _solve(stated: Problem, slopes: FloatArray, budget: float) -> IntArray:
    limit = budget + TOLERANCE / 2
    low, high = 0, len(slopes) - 1  # the smallest multiplier whose cheapest choices fit
    while low < high:
        middle = (low + high) // 2
        fits = _thriftiest(stated, slopes[middle])[1] <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    multiplier = float(slopes[low])
    at, spent = _thriftiest(stated, multiplier)
    at = _filled(stated, at, limit - spent)
    best = stated.solution(at)
    reduced = stated.scores + multiplier * stated.bits
    lowest = reduced.min(axis=1)
    gap = best.score - (float(lowest.sum()) - multiplier * limit)
    if multiplier == 0.0 or gap <= 1e-12 * best.score:
        return at
    reduced -= lowest[:, None]
    kept = reduced <= gap * (1 + 1e-9)
    kept[np.arange(len(at)), at] = True
    # Up to a constant the score is Σ reduced − λ · Σ bits; in units of the gap, so that tolerances mean little.
    cost = (reduced - multiplier * stated.bits) * (1e3 / gap)
    choice = integer_program(cost, [stated.bits], kept, [budget])
    if choice is None:
        return at
    better = stated.solution(choice)
    return choice if better.score < best.score and better.bits <= budget + TOLERANCE else at


def _thriftiest(stated: Problem, multiplier: float) -> tuple[IntArray, float]:
    """Cheapest choice per group at a multiplier, the one of fewest bits among equals, and its bits."""
    cost = stated.scores + multiplier * stated.bits
    lowest = cost.min(axis=1, keepdims=True)
    # A slope is a quotient: at it, two choices are equal up to rounding only.
    equal = cost <= lowest + 1e-12 * np.abs(lowest)
    at = np.where(equal, stated.bits, np.inf).argmin(axis=1).astype(np.int64)
    return at, float(stated.bits[np.arange(len(at)), at].sum())


def _filled(stated: Problem, at: IntArray, slack: float) -> IntArray:
    """Spends what the budget leaves on better choices of single groups, the largest gain first."""
    at = at.copy()
    rows = np.arange(len(at))
    while True:
        extra = stated.bits - stated.bits[rows, at][:, None]
        gain = np.where(extra <= slack, stated.scores[rows, at][:, None] - stated.scores, -np.inf)
        best = int(gain.argmax())
        group, choice = divmod(best, gain.shape[1])
        if gain[group, choice] <= 0:
            return at
        slack -= extra[group, choice]
        at[group] = choice


def integer_program(
    cost: FloatArray, spent: Sequence[FloatArray], kept: npt.NDArray[np.bool_], budgets: Sequence[float]
) -> IntArray | None:
    """Least sum of ``cost`` ``[G, K]`` among the kept choices, exactly.

    Args:
        cost: ``[G, K]``.
        spent: Of each budget ``[G, K]``, what a choice adds to it.
        kept: ``[G, K]``, one in every row at least.
        budgets: What the sums may be at most.

    Returns:
        ``[G]``, or ``None`` where no combination fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    fixed = kept.sum(axis=1) == 1
    at = kept.argmax(axis=1).astype(np.int64)
    groups, choices = np.nonzero(kept & ~fixed[:, None])
    if not len(groups):
        return at
    rows = np.unique(groups, return_inverse=True)[1]
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    left = [budget - float(s[fixed, at[fixed]].sum()) for s, budget in zip(spent, budgets, strict=True)]
    with silent():
        answer = milp(
            cost[groups, choices],
            integrality=np.ones(len(groups)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                *(
                    LinearConstraint(s[groups, choices][None], -np.inf, most)
                    for s, most in zip(spent, left, strict=True)
                ),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if answer.x is None:
        return None
    taken = answer.x > 0.5
    at[groups[taken]] = choices[taken]
    return at


@contextmanager
def silent() -> Iterator[None]:
    """Keeps away what HiGHS (in SciPy 1.17) prints for its developers, below Python and whatever ``disp`` says."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        libc.fflush(None)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
