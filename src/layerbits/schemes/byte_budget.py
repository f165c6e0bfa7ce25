"""Schemes under a budget in GiB, alone or beside one in bits per weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment, IntArray
from layerbits.results.result import CandidateInfo, FloatArray
from layerbits.schemes import solver
from layerbits.schemes.catalog import Budget
from layerbits.schemes.sizes import GIB, Sizes
from layerbits.schemes.source import Source
from layerbits.schemes.within import best_within


@dataclass(frozen=True)
class _Bytes:
    """Bytes of the choices, on the scale of bits per weight: the tolerances of the solver are made for that.

    Attributes:
        costs: ``[G, K]``, unquantized last, which sums to 16.
        eligible: ``[G, K]`` whether a choice can be exported.
        unit: Bytes of one on that scale.
        fixed: Bytes of what no choice changes, the KV cache included.
        kv_cache: Of these, the KV cache.
    """

    costs: FloatArray
    eligible: np.ndarray
    unit: float
    fixed: float
    kv_cache: int

    @classmethod
    def of(cls, sizes: Sizes, columns: Sequence[int]) -> _Bytes:
        """For some candidates."""
        costs, rest = sizes.costs(columns)
        eligible = np.isfinite(costs)
        unit = float(costs[:, -1].sum()) / UNQUANTIZED_BITS
        costs = np.where(eligible, costs, costs[:, -1:]) / unit
        return cls(costs, eligible, unit, float(rest + sizes.kv_cache), sizes.kv_cache)

    def budget(self, gib: float) -> float:
        """What is left for the choices, on their scale."""
        return (gib * GIB - self.fixed) / self.unit

    def gib(self, spent: float) -> float:
        """GiB of everything."""
        return (spent * self.unit + self.fixed) / GIB


def solved_in_bytes(
    source: Source, columns: Sequence[int], stated: solver.Problem, budgets: Sequence[Budget]
) -> list[Assignment]:
    """The assignment of least score sum under each budget.

    Args:
        source: With its sizes.
        columns: Positions of the candidates.
        stated: Their scores and bits.
        budgets: In GiB, or in GiB and bits.

    Raises:
        UserError: A budget is below what any choice takes; the floor is named in its unit.
    """
    assert source.sizes is not None
    size = _Bytes.of(source.sizes, columns)
    eligible = solver.Problem(stated.candidates, np.where(size.eligible, stated.scores, np.inf), stated.bits)
    assignments = []
    for budget in budgets:
        at = _choice(eligible, size, budget)
        names = np.where(at == len(stated.candidates), UNQUANTIZED, at).tolist()
        assignments.append(Assignment.at(names, stated.candidates))
    return assignments


def not_exported(source: Source, candidates: Sequence[CandidateInfo]) -> list[str]:
    """A note for each candidate that a budget in GiB cannot count."""
    assert source.sizes is not None
    names = source.sizes.missing([source.candidates.index(c) for c in candidates])
    return [f"{name} cannot be exported, so its bytes are not known: not eligible under budget_gib" for name in names]


def _choice(stated: solver.Problem, size: _Bytes, budget: Budget) -> IntArray:
    assert budget.gib is not None
    by_size = solver.Problem(stated.candidates, stated.scores, size.costs)
    most = size.budget(budget.gib)
    if by_size.floor > most + solver.TOLERANCE:
        cache = f", {size.kv_cache / GIB:.4g} GiB of that the KV cache" if size.kv_cache else ""
        raise UserError(
            f"budget_gib={budget.gib:g} cannot be reached: the least is {size.gib(by_size.floor):.4g} GiB "
            f"({size.fixed / GIB:.4g} GiB whatever is chosen{cache}); choose more"
        )
    if budget.bits is None:
        return solver.best_choice(by_size, most)
    solver.check(stated, budget.bits)
    choice = best_within(stated.scores, (stated.bits, size.costs), (budget.bits, most))
    if choice is None:
        sizes = np.where(np.isfinite(stated.scores), size.costs, np.inf)
        least = solver.best_choice(solver.Problem(stated.candidates, sizes, stated.bits), budget.bits)
        spent = float(size.costs[np.arange(len(least)), least].sum())
        raise UserError(
            f"effective_bits={budget.bits:g} and budget_gib={budget.gib:g} cannot be reached together: under "
            f"effective_bits={budget.bits:g} the least is {size.gib(spent):.4g} GiB; choose more of one of them"
        )
    return choice
