"""Top-K by block: the solver's decisions are kept in some of the blocks and reverted in the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from layerbits.errors import UserError
from layerbits.results.result import FloatArray, Group

ORDERS = ("least_sensitive", "most_sensitive")


def block_scores(groups: Sequence[Group], scores: FloatArray) -> dict[int, float]:
    """Scores summed per block.

    Args:
        groups: ``[G]``; those outside the blocks (the output head) are left out.
        scores: ``[G, C]``; with several candidates the sum runs over all of them.

    Returns:
        Block → sum of its finite scores; infinite where a group of it has none.
    """
    sums: dict[int, float] = {}
    for group, row in zip(groups, scores, strict=True):
        if group.block is not None:
            finite = row[np.isfinite(row)]
            value = float(finite.sum()) if finite.size else math.inf
            sums[group.block] = sums.get(group.block, 0.0) + value
    return sums


def covered_blocks(groups: Sequence[Group], scores: FloatArray, coverage: float, order: str) -> list[int]:
    """Blocks that keep their decisions, ascending.

    Args:
        groups: ``[G]``.
        scores: ``[G, C]``.
        coverage: Share of the blocks, above 0 and up to 1; a half block counts up, at least one is kept.
        order: ``least_sensitive`` keeps the blocks with the smallest scores, ``most_sensitive`` those with the largest.

    Raises:
        UserError: An argument is out of range, or no group is in a block.
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage={coverage:g} is not a share of blocks; use a number above 0 and up to 1")
    if order not in ORDERS:
        raise UserError(f"coverage_order={order} is not known; use {' or '.join(ORDERS)}")
    sums = block_scores(groups, scores)
    if not sums:
        raise UserError("no scored linear is in a decoder block, so coverage has no meaning; use effective_bits alone")
    count = max(1, math.floor(coverage * len(sums) + 0.5))
    ranked = sorted(sums, key=lambda block: (sums[block], block), reverse=order == "most_sensitive")
    return sorted(ranked[:count])
