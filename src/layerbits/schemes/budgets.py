"""Which groups share a budget: all of them, or those of the language model and of the vision tower apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.results.assignment import IntArray
from layerbits.results.result import VISION_KINDS, Group
from layerbits.schemes.catalog import SchemeSpec


@dataclass(frozen=True)
class Part:
    """Groups that share a budget.

    Attributes:
        at: Their positions.
        budgets: Effective bits over them, one per budget of the spec.
        key: What the user calls them.
    """

    at: IntArray
    budgets: tuple[float, ...]
    key: str = "effective_bits"


def parts(spec: SchemeSpec, groups: Sequence[Group]) -> list[Part]:
    """What the solver solves apart.

    Args:
        spec: Its budgets.
        groups: ``[G]``.

    Raises:
        UserError: The vision tower has a budget of its own, and none or nothing else was scored.
    """
    if spec.vision_bits is None:
        return [Part(np.arange(len(groups)), spec.effective_bits)]
    tower = np.array([group.kind in VISION_KINDS for group in groups])
    if not tower.any() or tower.all():
        what = "no vision tower" if not tower.any() else "nothing but a vision tower"
        raise UserError(
            f"vision_bits={spec.vision_bits:g}, but the run scored {what}; score with model.vision=true, or leave "
            "vision_bits out"
        )
    return [
        Part(np.flatnonzero(~tower), spec.effective_bits),
        Part(np.flatnonzero(tower), (spec.vision_bits,) * len(spec.effective_bits), "vision_bits"),
    ]
