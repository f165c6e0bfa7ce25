"""Intervals of a result as plain data, and as a manifest tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from layerbits.plain import JsonMapping

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Intervals:
    """How sure the predicted KL and its ranking are, from captions drawn again (:mod:`layerbits.results.bootstrap`).

    ``G`` groups.

    Attributes:
        level: Confidence of ``low`` to ``high`` and of ``rank_low`` to ``rank_high``.
        captions: Captions that were drawn from.
        low: ``[G]`` nats per token; NaN where the predicted KL is not finite. high: Likewise.
        rank_low: ``[G]``, 1 = most sensitive; 0 where the predicted KL is not finite. rank_high: Likewise.
        tied: Per group, the positions of the groups whose order against it is not supported, most
            sensitive first.
        top: The number of most sensitive groups that the next two are about.
        top_overlap: How many of them two calibrations, each on as many other captions, would have in common;
            NaN where there are no more groups than that.
        top_captions: Captions with which they would have all but one in common; infinite where 32 times as
            many would not do, NaN as above.
    """

    level: float
    captions: int
    low: FloatArray
    high: FloatArray
    rank_low: npt.NDArray[np.int64]
    rank_high: npt.NDArray[np.int64]
    tied: tuple[tuple[int, ...], ...]
    top: int
    top_overlap: float
    top_captions: float

    def row(self, group: int, keys: Sequence[str]) -> dict[str, object]:
        """One group: low, high, rank_low and rank_high (``None`` where not known), and the keys it is tied with."""
        return {
            "low": float(self.low[group]),
            "high": float(self.high[group]),
            "rank_low": int(self.rank_low[group]) or None,
            "rank_high": int(self.rank_high[group]) or None,
            "tied": [keys[i] for i in self.tied[group]],
        }

    def to_json(self, candidate: str) -> dict[str, object]:
        """Plain JSON data of what does not stand in the rows, under the candidate's name where a manifest has it so."""
        return {
            "level": self.level,
            "captions": self.captions,
            "top": self.top,
            "top_overlap": {candidate: _plain(self.top_overlap)},
            "top_captions": {candidate: _plain(self.top_captions)},
        }

    @classmethod
    def from_json(
        cls,
        data: JsonMapping | None,
        candidate: str,
        rows: Sequence[JsonMapping],
        row_of: Mapping[str, int],
    ) -> Intervals | None:
        """Reads :meth:`to_json` and :meth:`row` back.

        Args:
            data: ``None`` where a manifest was written without intervals.
            candidate: Its name.
            rows: One per group, with its key as ``layer``.
            row_of: Group key → position.

        Raises:
            KeyError: Something is missing.
        """
        if data is None:
            return None
        ends = {name: np.full(len(row_of), np.nan) for name in ("low", "high")}
        ranks = {name: np.zeros(len(row_of), dtype=np.int64) for name in ("rank_low", "rank_high")}
        tied: list[tuple[int, ...]] = [()] * len(row_of)
        for row in rows:
            g = row_of[row["layer"]]
            for name, end in ends.items():
                end[g] = np.nan if row[name] is None else row[name]
            for name, rank in ranks.items():
                rank[g] = row[name] or 0
            tied[g] = tuple(row_of[key] for key in row["tied"])
        return cls(
            level=data["level"],
            captions=data["captions"],
            low=ends["low"],
            high=ends["high"],
            rank_low=ranks["rank_low"],
            rank_high=ranks["rank_high"],
            tied=tuple(tied),
            top=data["top"],
            top_overlap=_number(data["top_overlap"][candidate]),
            top_captions=_number(data["top_captions"][candidate]),
        )


def _plain(value: float) -> float | str | None:
    """The value; JSON has no NaN (``None``) and no infinity (``"inf"``)."""
    if math.isinf(value):
        return "inf"
    return None if math.isnan(value) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
