"""Which groups share a budget: all of them, or those of the language model and of the vision tower apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.plain import unset
from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment, IntArray
from layerbits.results.result import VISION_KINDS, FloatArray
from layerbits.schemes import solver


@dataclass(frozen=True)
class Part:
    """Groups that share a budget.

    Attributes:
        at: Their positions.
        budgets: Effective bits over them, one per budget that was asked for.
        key: What the user calls them.
    """

    at: IntArray
    budgets: tuple[float, ...]
    key: str = "effective_bits"


def parts(effective_bits: Sequence[float], vision_bits: float | None, kinds: Sequence[str]) -> list[Part]:
    """What a solver solves apart.

    Args:
        effective_bits: Budgets in bits per weight.
        vision_bits: Budget of the vision tower alone, the same beside each of those, which then count over all other
            groups; ``None`` = all groups share a budget.
        kinds: ``[G]`` kinds of the groups.

    Raises:
        UserError: The vision tower has a budget of its own, and none or nothing else is scored.
    """
    if vision_bits is None:
        return [Part(np.arange(len(kinds)), tuple(effective_bits))]
    tower = np.array([kind in VISION_KINDS for kind in kinds])
    if not tower.any():
        raise UserError(
            f"vision_bits={vision_bits:g}, but no vision tower is scored; score with model.vision=true, or leave "
            "vision_bits out"
        )
    if tower.all():
        raise UserError(
            f"vision_bits={vision_bits:g}, but nothing but a vision tower is scored; give its budget as effective_bits"
        )
    return [
        Part(np.flatnonzero(~tower), tuple(effective_bits)),
        Part(np.flatnonzero(tower), (vision_bits,) * len(effective_bits), "vision_bits"),
    ]


def solve_parts(
    values: FloatArray, bits: Mapping[str, float], weights: Sequence[float], shared: Sequence[Part]
) -> list[Assignment]:
    """Least sum under each budget, each part alone.

    Args:
        values: ``[G, C]`` what is summed; a candidate is not eligible for a group where it is not finite.
        bits: Candidate → weight storage bits per weight.
        weights: ``[G]`` what each group counts.
        shared: From :func:`parts`.

    Returns:
        The assignment of each budget.

    Raises:
        UserError: A budget is infeasible.
    """
    names, counted = list(bits), np.asarray(weights)
    positions = np.full((len(shared[0].budgets), len(values)), UNQUANTIZED)
    for part in shared:
        found = solver.pareto(values[part.at], bits, counted[part.at].tolist(), part.budgets, part.key)
        for row, solution in zip(positions, found, strict=True):
            row[part.at] = solution.assignment.positions(names)
    return [Assignment.at(row.tolist(), names) for row in positions]


def tower_budget(value: object, key: str) -> float | None:
    """A vision tower's own budget as it is written in a configuration; ``None`` = it has none.

    Args:
        value: A number or ``none``.
        key: What the user calls it.

    Raises:
        UserError: It is no number above 0.
    """
    if unset(value):
        return None
    try:
        bits = float(str(value))
    except ValueError:
        raise UserError(f"{key}={value} is not a number; give bits per weight of the vision tower") from None
    return check_bits(key, bits)


def check_bits(key: str, bits: float) -> float:
    """A budget in bits per weight, as far as it can be judged without candidates.

    Args:
        key: What the user calls it.
        bits: The budget.

    Raises:
        UserError: It is no number above 0, or more than weights have that stay as they are.
    """
    if not 0 < bits < math.inf:
        raise UserError(f"{key}={bits:g} is no budget; give a number above 0")
    if bits > UNQUANTIZED_BITS:
        raise UserError(
            f"{key}={bits:g} cannot be reached: weights that stay as they are have {UNQUANTIZED_BITS:g} bits; give a "
            "number up to that"
        )
    return bits
