"""What a step of a server takes under the schemes of a source: times of linears, summed.

The numbers are made by :mod:`layerbits.checkpoint.times`, which knows how a group is stored; here they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from layerbits.results.assignment import Assignment
from layerbits.results.result import FloatArray
from layerbits.schemes.cost_table import Step
from layerbits.schemes.sizes import how_read

MS = 1e-3
MILLISECONDS = ("ms", "linears_ms", "unquantized_ms")
"""Keys of :meth:`Times.record`."""


@dataclass(frozen=True)
class Times:
    """Seconds of the schemes of a source.

    Attributes:
        candidates: Names, in the order of the source; ``K = C + 1``.
        formats: By format of the checkpoint, the preferred one first: ``[G, K]`` of a group under each candidate,
            unquantized last; infinite where vLLM does not run it.
        unquantized: Of the step of the whole unquantized model, as it was measured.
        step: Which step.
        where: Card and vLLM, in words.
        refused: Candidate → why vLLM runs it in no format.
        alone: By format, the candidates that some vLLM refuses beside others.
    """

    candidates: tuple[str, ...]
    formats: Mapping[str, FloatArray]
    unquantized: float
    step: Step
    where: str
    refused: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def rest(self) -> float:
        """What no choice changes: the step without the groups' linears."""
        return self.unquantized - float(self._first[:, -1].sum())

    def format_of(self, used: Collection[str]) -> str | None:
        """The format in which vLLM runs some candidates, as they are exported; ``None`` where it does in none."""
        able = [name for name in self.formats if all(self._runs(name, one) for one in used)]
        together = {name: how_read(used, frozenset(used), self.alone.get(name, frozenset())) for name in able}
        return max(able, key=together.__getitem__, default=None)

    def seconds(self, assignment: Assignment) -> float:
        """Of the step under a scheme; NaN where vLLM does not run it."""
        name = self.format_of(assignment.used)
        if name is None:
            return math.nan
        at = assignment.positions(self.candidates)  # unquantized is -1: the last column
        total = self.rest + float(self.formats[name][np.arange(len(at)), at].sum())
        return total if math.isfinite(total) else math.nan

    def costs(self, columns: Collection[int]) -> FloatArray:
        """Seconds that a solver may count for some candidates: never less than a scheme of them takes.

        A scheme of fewer candidates may be exported in another format than one of all; the larger of the two counts.

        Args:
            columns: Positions of the candidates.

        Returns:
            ``[G, K]`` unquantized last, infinite where vLLM does not run a candidate.
        """
        names = [self.candidates[c] for c in columns]
        together = self.format_of(names)
        parts = []
        for column, name in zip(columns, names, strict=True):
            formats = {together, self.format_of([name])} - {None}
            each = [self.formats[one][:, column] for one in formats if one is not None]
            parts.append(np.max(each, axis=0) if each else np.full(len(self._first), np.inf))
        return np.stack([*parts, self._first[:, -1]], axis=1)

    def record(self, assignment: Assignment) -> dict[str, float]:
        """What a scheme takes, in milliseconds: ``ms`` of the step, ``linears_ms`` of that the groups' linears.

        Beside ``unquantized_ms``, the measured step of the unquantized model; empty where vLLM does not run the scheme.
        """
        total = self.seconds(assignment)
        if math.isnan(total):
            return {}
        seconds = (total, total - self.rest, self.unquantized)
        return {key: one / MS for key, one in zip(MILLISECONDS, seconds, strict=True)}

    @property
    def _first(self) -> FloatArray:
        return next(iter(self.formats.values()))

    def _runs(self, format: str, candidate: str) -> bool:
        return bool(np.isfinite(self.formats[format][:, self.candidates.index(candidate)]).any())
