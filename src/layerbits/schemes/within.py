"""The best choice under several budgets at once: Lagrangian reduction by the duals of the relaxation, then HiGHS.

What :mod:`layerbits.schemes.solver` does for one budget, for any number: multipliers ``λ`` give the lower bound
``Σ min(s + λ·a) − λ·b``; a choice whose reduced cost exceeds the gap between it and a known choice is no part of an
optimum, and the integer program is left with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from layerbits.results.assignment import IntArray
from layerbits.results.result import FloatArray
from layerbits.schemes import solver

_STEPS = (1.0, 1.02, 1.1, 1.3, 2.0, 4.0, 16.0, 256.0, 65536.0)
"""Factors on the multipliers that are tried in turn for a choice that fits."""


def best_within(scores: FloatArray, costs: Sequence[FloatArray], budgets: Sequence[float]) -> IntArray | None:
    """The choice of least score sum that keeps every budget.

    Args:
        scores: ``[G, K]``; infinite where a choice is not eligible. Every row has one that is.
        costs: Of each budget ``[G, K]``, finite, what a choice adds to it; of a size that :data:`solver.TOLERANCE` is
            little of.
        budgets: What the sums may be at most.

    Returns:
        ``[G]``, or ``None`` where no choice keeps all of them.
    """
    names = tuple(str(k) for k in range(scores.shape[1] - 1))
    least = []
    for cost, budget in zip(costs, budgets, strict=True):
        stated = solver.Problem(names, scores, cost)
        if stated.floor > budget + solver.TOLERANCE:
            return None
        alone = solver.best_choice(stated, budget)
        if _fits(alone, costs, budgets):
            return alone  # as good as it gets under one of the budgets, and within the others
        least.append(_sum(scores, alone))
    return _both(scores, np.stack(costs), np.asarray(budgets, dtype=np.float64), max(least))


def weighed(scores: FloatArray, costs: Sequence[FloatArray], budgets: Sequence[float]) -> tuple[FloatArray, float]:
    """Several budgets as one, in the proportion in which the relaxed optimum pays for them.

    Args:
        scores: As :func:`best_within` takes them, and the others.
        costs: Of each budget.
        budgets: What the sums may be at most.

    Returns:
        ``[G, K]`` what a choice adds to it, and what the sum may be at most: the weighted means of the budgets.
    """
    if len(costs) == 1:
        return costs[0], budgets[0]
    every, most = np.stack(costs), np.asarray(budgets, dtype=np.float64)
    largest = float(scores[np.isfinite(scores)].max())
    paid = _multipliers(scores * (1e3 / (largest or 1.0)), every, most)  # so that the tolerances of HiGHS mean little
    if paid is None or not paid.any():  # none of them is short
        paid = np.ones(len(most))
    share = paid / paid.sum()
    return np.einsum("b,bgk->gk", share, every), float(share @ most)


def _both(scores: FloatArray, costs: FloatArray, budgets: FloatArray, bound: float) -> IntArray | None:
    finite = scores[np.isfinite(scores)]
    unit = bound if bound > 0 else float(finite.max()) or 1.0
    scaled = scores * (1e3 / unit)  # so that the tolerances of HiGHS mean little
    multipliers = _multipliers(scaled, costs, budgets)
    if multipliers is None:
        return None
    reduced = scaled + np.einsum("b,bgk->gk", multipliers, costs)
    lowest = reduced.min(axis=1)
    known = _near(scaled, costs, budgets, multipliers)
    kept = np.isfinite(scores)
    if known is not None:
        gap = _sum(scaled, known) - (float(lowest.sum()) - float(multipliers @ budgets))
        if gap <= 1e-9 * _sum(scaled, known):
            return known
        kept &= reduced - lowest[:, None] <= gap * (1 + 1e-9) + 1e-9
        kept[np.arange(len(known)), known] = True
    choice = solver.integer_program(np.where(kept, scaled, 0.0), list(costs), kept, budgets.tolist())
    if choice is None or not _fits(choice, costs, budgets):
        return known
    return known if known is not None and _sum(scores, known) <= _sum(scores, choice) else choice


def _multipliers(scores: FloatArray, costs: FloatArray, budgets: FloatArray) -> FloatArray | None:
    """Duals of the budgets in the linear relaxation, none negative; ``None`` where even that has no solution."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    groups, choices = np.nonzero(np.isfinite(scores))
    one_each = csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    with solver.silent():
        answer = linprog(
            scores[groups, choices],
            A_ub=costs[:, groups, choices],
            b_ub=budgets,
            A_eq=one_each,
            b_eq=np.ones(len(scores)),
            bounds=(0, None),
            method="highs",
        )
    return np.maximum(-answer.ineqlin.marginals, 0.0) if answer.status == 0 else None


def _near(scores: FloatArray, costs: FloatArray, budgets: FloatArray, multipliers: FloatArray) -> IntArray | None:
    """A choice that fits, near the relaxed one; ``None`` where no factor on the multipliers gives one."""
    least = 1e-6 * max(float(multipliers.max()), 1e-12)
    for factor in _STEPS:
        weighed = np.einsum("b,bgk->gk", np.maximum(multipliers, least) * factor, costs)
        at = (scores + weighed).argmin(axis=1).astype(np.int64)
        if _fits(at, costs, budgets):
            return _filled(scores, costs, budgets, at)
    return None


def _filled(scores: FloatArray, costs: FloatArray, budgets: FloatArray, at: IntArray) -> IntArray:
    """Spends what the budgets leave on better choices of single groups, the largest gain first."""
    at, rows = at.copy(), np.arange(len(at))
    while True:
        slack = budgets + solver.TOLERANCE / 2 - costs[:, rows, at].sum(axis=1)
        extra = costs - costs[:, rows, at][:, :, None]
        fits = (extra <= slack[:, None, None]).all(axis=0)
        gain = np.where(fits, scores[rows, at][:, None] - scores, -np.inf)
        group, choice = divmod(int(gain.argmax()), gain.shape[1])
        if gain[group, choice] <= 0:
            return at
        at[group] = choice


def _fits(at: IntArray, costs: Sequence[FloatArray] | FloatArray, budgets: Sequence[float] | FloatArray) -> bool:
    return all(_sum(cost, at) <= budget + solver.TOLERANCE for cost, budget in zip(costs, budgets, strict=True))


def _sum(values: npt.NDArray[np.float64], at: IntArray) -> float:
    return float(values[np.arange(len(at)), at].sum())
