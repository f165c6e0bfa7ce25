"""Controls: assignments that know nothing of the scores and take as many bits as a scheme that does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerbits.results.assignment import UNQUANTIZED, UNQUANTIZED_BITS, Assignment
from layerbits.results.result import CandidateInfo, Group, costs
from layerbits.schemes.solver import TOLERANCE

KINDS = ("random", "first_last")
_DRAWS = 500


def control(
    kind: str,
    reference: Assignment,
    groups: Sequence[Group],
    candidates: Sequence[CandidateInfo],
    eligible: np.ndarray,
    seed: int,
    cost_model: str = "weight",
) -> Assignment:
    """Quantizes groups in an order that the scores have no say in, up to the bits of a reference.

    Groups are taken in turn, each with a candidate drawn as often as the reference uses it, as long as no more is saved
    than the reference saves. Sizes of groups do not always add up to the same sum: of many draws the one that comes
    nearest is taken, the first exact one at once.

    Args:
        kind: ``random``: any order. ``first_last``: from the middle block outwards, so that the first and last blocks
            stay unquantized; groups of a block, and blocks as far from the middle, in any order.
        reference: The assignment that has the bits.
        groups: ``[G]``.
        candidates: ``[C]``.
        eligible: ``[G, C]`` whether a candidate may be used for a group.
        seed: Of the draws.
        cost_model: What bits count.
    """
    rng, names = np.random.default_rng(seed), [c.name for c in candidates]
    given = reference.positions(names)
    quantized = given != UNQUANTIZED
    used = given[quantized]
    weights = np.array(costs(groups, cost_model), dtype=np.float64)
    saving = weights[:, None] / weights.sum() * (UNQUANTIZED_BITS - np.array([c.bits for c in candidates]))
    target = float(saving[quantized, used].sum())
    distance = _from_middle(groups) if kind == "first_last" else np.zeros(len(groups))
    best, missed = np.full(len(groups), UNQUANTIZED), target
    for _ in range(_DRAWS):
        if missed <= TOLERANCE or not len(used):
            break
        order = np.lexsort((rng.random(len(groups)), distance))
        drawn = rng.choice(used, len(groups))
        choice, left = np.full(len(groups), UNQUANTIZED), target
        for group in order:
            candidate = drawn[group]
            if eligible[group, candidate] and saving[group, candidate] <= left + TOLERANCE:
                choice[group] = candidate
                left -= saving[group, candidate]
        if left < missed:
            best, missed = choice, left
    return Assignment.at(best.tolist(), names)


def _from_middle(groups: Sequence[Group]) -> np.ndarray:
    """``[G]`` distance of a group's block from the middle of the stack; outside the blocks beyond every block."""
    last = max((g.block for g in groups if g.block is not None), default=0)
    return np.array([last if g.block is None else abs(g.block - last / 2) for g in groups])
