"""Intervals of a result as plain data, and as a manifest tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Intervals:
    """How sure the predicted KL and its ranking are, from captions drawn again (:mod:`layerbits.results.bootstrap`).

    ``G`` groups, ``C`` candidates.

    Attributes:
        level: Confidence of ``low`` to ``high`` and of ``rank_low`` to ``rank_high``.
        captions: Captions that were drawn from.
        low: ``[G, C]`` nats per token; NaN where the predicted KL is not finite. high: Likewise.
        rank_low: ``[G, C]``, 1 = most sensitive; 0 where the predicted KL is not finite. rank_high: Likewise.
        tied: Per candidate and group, the positions of the groups whose order against it is not supported, most
            sensitive first.
        top: The number of most sensitive groups that the next two are about.
        top_overlap: ``[C]`` how many of them two calibrations, each on as many other captions, would have in common;
            NaN where there are no more groups than that.
        top_captions: ``[C]`` captions with which they would have all but one in common; infinite where 32 times as
            many would not do, NaN as above.
    """

    level: float
    captions: int
    low: FloatArray
    high: FloatArray
    rank_low: npt.NDArray[np.int64]
    rank_high: npt.NDArray[np.int64]
    tied: tuple[tuple[tuple[int, ...], ...], ...]
    top: int
    top_overlap: FloatArray
    top_captions: FloatArray

    def select(self, candidate: int) -> Intervals:
        """The part of one candidate."""
        arrays = {name: getattr(self, name)[:, [candidate]] for name in ("low", "high", "rank_low", "rank_high")}
        tops = {name: getattr(self, name)[[candidate]] for name in ("top_overlap", "top_captions")}
        return replace(self, **arrays, **tops, tied=(self.tied[candidate],))

    def row(self, group: int, candidate: int, keys: Sequence[str]) -> dict[str, Any]:
        """One group: low, high, rank_low and rank_high (``None`` where not known), and the keys it is tied with."""
        return {
            "low": float(self.low[group, candidate]),
            "high": float(self.high[group, candidate]),
            "rank_low": int(self.rank_low[group, candidate]) or None,
            "rank_high": int(self.rank_high[group, candidate]) or None,
            "tied": [keys[i] for i in self.tied[candidate][group]],
        }

    def told(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain JSON data of what does not stand in the rows; ``names`` are those of the candidates."""
        return {
            "level": self.level,
            "captions": self.captions,
            "top": self.top,
            "top_overlap": dict(zip(names, map(_plain, self.top_overlap.tolist()), strict=True)),
            "top_captions": dict(zip(names, map(_plain, self.top_captions.tolist()), strict=True)),
        }

    @classmethod
    def from_told(
        cls,
        told: Mapping[str, Any] | None,
        rows: Sequence[Mapping[str, Any]],
        row_of: Mapping[str, int],
        column_of: Mapping[str, int],
    ) -> Intervals | None:
        """Reads :meth:`told` and :meth:`row` back.

        Args:
            told: ``None`` where a manifest was written without intervals.
            rows: One per group and candidate, with ``layer`` and ``candidate``.
            row_of: Group key → position.
            column_of: Candidate name → position.

        Raises:
            KeyError: Something is missing.
        """
        if told is None:
            return None
        shape = len(row_of), len(column_of)
        ends = {name: np.full(shape, np.nan) for name in ("low", "high")}
        ranks = {name: np.zeros(shape, dtype=np.int64) for name in ("rank_low", "rank_high")}
        tied: list[list[tuple[int, ...]]] = [[()] * shape[0] for _ in range(shape[1])]
        for row in rows:
            g, c = row_of[row["layer"]], column_of[row["candidate"]]
            for name, end in ends.items():
                end[g, c] = np.nan if row[name] is None else row[name]
            for name, rank in ranks.items():
                rank[g, c] = row[name] or 0
            tied[c][g] = tuple(row_of[key] for key in row["tied"])
        tops = {name: np.array([_number(told[name][c]) for c in column_of]) for name in ("top_overlap", "top_captions")}
        return cls(
            level=told["level"],
            captions=told["captions"],
            low=ends["low"],
            high=ends["high"],
            rank_low=ranks["rank_low"],
            rank_high=ranks["rank_high"],
            tied=tuple(map(tuple, tied)),
            top=told["top"],
            top_overlap=tops["top_overlap"],
            top_captions=tops["top_captions"],
        )


def _plain(value: float) -> float | str | None:
    """The value; JSON has no NaN (``None``) and no infinity (``"inf"``)."""
    if math.isinf(value):
        return "inf"
    return None if math.isnan(value) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
