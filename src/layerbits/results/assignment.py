"""Which candidate each group gets: what a solver chooses, a recipe decides, a scheme holds and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from layerbits.results.result import Group

UNQUANTIZED = -1
UNQUANTIZED_BITS = 16.0

IntArray = npt.NDArray[np.int64]


class Assignment(tuple[str | None, ...]):
    """A candidate's name per group, in the order of the groups; ``None`` = left unquantized.

    Empty where it is not known, as in some imported results.
    """

    __slots__ = ()

    @classmethod
    def at(cls, positions: Iterable[int], names: Sequence[str]) -> Assignment:
        """The assignment of positions among the names, :data:`UNQUANTIZED` = none."""
        return cls(None if at == UNQUANTIZED else names[at] for at in positions)

    def positions(self, names: Sequence[str]) -> IntArray:
        """``[G]`` position of each candidate among the names, :data:`UNQUANTIZED` = none."""
        at: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        return np.array([UNQUANTIZED if name is None else at[name] for name in self], dtype=np.int64)

    @property
    def quantized(self) -> int:
        """How many groups are quantized."""
        return len(self) - self.count(None)

    @property
    def used(self) -> set[str]:
        """Names of the candidates that a group gets."""
        return {name for name in self if name is not None}

    def within(self, groups: Sequence[Group], blocks: Collection[int]) -> Assignment:
        """The same with every group outside the blocks left unquantized."""
        return Assignment(name if group.block in blocks else None for group, name in zip(groups, self, strict=True))

    def differs(self, other: Assignment) -> int:
        """Groups that another assignment treats otherwise."""
        return sum(mine != theirs for mine, theirs in zip(self, other, strict=True))
