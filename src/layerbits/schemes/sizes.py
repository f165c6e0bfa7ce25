"""What schemes take in a server's memory: the bytes of their checkpoints, and those of keys and values.

The numbers are made by :mod:`layerbits.checkpoint.sizes`, which knows how weights lie in files; here they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.results.assignment import Assignment
from layerbits.results.result import FloatArray

GIB = 2.0**30


@dataclass(frozen=True)
class Load:
    """What a server keeps beside the weights.

    Attributes:
        context: Tokens of a request whose keys and values are kept; 0 = none are counted.
        concurrency: Requests at once.
    """

    context: int = 0
    concurrency: int = 1

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: One is too small.
        """
        if self.context < 0:
            raise UserError(f"context={self.context} is not a number of tokens; use 0 for none")
        if self.concurrency < 1:
            raise UserError(f"concurrency={self.concurrency} is not a number of requests; use 1 or more")


@dataclass(frozen=True)
class Stored:
    """Bytes of a checkpoint in one format.

    Attributes:
        rest: What no choice changes: embeddings, norms, biases, what is not searched.
        choices: ``[G, K]`` of a group under each candidate, unquantized last; infinite where it cannot be exported.
        served: Names of the candidates that vLLM reads in this format.
        alone: Of these, those that some vLLM refuses beside others.
    """

    rest: int
    choices: FloatArray
    served: frozenset[str]
    alone: frozenset[str] = frozenset()


def how_read(used: Collection[str], served: frozenset[str], alone: frozenset[str]) -> int:
    """How far vLLM reads a checkpoint with some candidates: 2 = all together, 1 = each alone, 0 = not all.

    Args:
        used: Names of the candidates.
        served: Those that vLLM reads.
        alone: Of these, those that some vLLM refuses beside others.
    """
    if not served.issuperset(used):
        return 0
    return 1 if len(set(used)) > 1 and not alone.isdisjoint(used) else 2


@dataclass(frozen=True)
class Sizes:
    """Bytes of the schemes of a source.

    Attributes:
        candidates: Names, in the order of the source; ``K = C + 1``.
        formats: By format of the checkpoint, the preferred one first.
        kv_cache: Keys and values of the whole load.
        load: What they are of.
    """

    candidates: tuple[str, ...]
    formats: Mapping[str, Stored]
    kv_cache: int
    load: Load

    def format_of(self, used: Collection[str]) -> str | None:
        """The format that a scheme with some candidates is exported in; ``None`` where none has all of them.

        As :func:`layerbits.checkpoint.formats.choose_format` has it.
        """
        able = [name for name in self.formats if all(self._exported(name, one) for one in used)]
        read = {name: how_read(used, self.formats[name].served, self.formats[name].alone) for name in able}
        return max(able, key=read.__getitem__, default=None)

    def missing(self, columns: Collection[int]) -> list[str]:
        """Names of the candidates that no format has."""
        return [self.candidates[c] for c in columns if self.format_of([self.candidates[c]]) is None]

    def checkpoint(self, assignment: Assignment) -> float:
        """Bytes of a scheme's checkpoint; NaN where it cannot be exported."""
        name = self.format_of(assignment.used)
        if name is None:
            return math.nan
        stored = self.formats[name]
        at = assignment.positions(self.candidates)  # unquantized is -1: the last column
        total = stored.rest + float(stored.choices[np.arange(len(at)), at].sum())
        return total if math.isfinite(total) else math.nan

    def costs(self, columns: Collection[int]) -> tuple[FloatArray, int]:
        """Bytes that a solver may count for some candidates: never less than the checkpoint of a scheme of them has.

        A scheme of fewer candidates may be exported in another format than one of all; the larger of the two counts.

        Args:
            columns: Positions of the candidates.

        Returns:
            ``[G, K]`` unquantized last, infinite where a candidate cannot be exported, and what no choice changes.
        """
        names = [self.candidates[c] for c in columns]
        together = self.format_of(names)
        parts = []
        for column, name in zip(columns, names, strict=True):
            formats = {together, self.format_of([name])} - {None}
            each = [self.formats[one].choices[:, column] for one in formats if one is not None]
            parts.append(np.max(each, axis=0) if each else np.full(len(self._first.choices), np.inf))
        rest = max(stored.rest for stored in self.formats.values())
        return np.stack([*parts, self._first.choices[:, -1]], axis=1), rest

    def record(self, assignment: Assignment) -> dict[str, float]:
        """What a scheme takes, in GiB: ``gib`` of all, ``weights_gib`` of the checkpoint, ``kv_cache_gib``.

        With the load that it is of, ``context`` and ``concurrency``; empty where the scheme cannot be exported.
        """
        weights = self.checkpoint(assignment)
        if math.isnan(weights):
            return {}
        return {
            "gib": (weights + self.kv_cache) / GIB,
            "weights_gib": weights / GIB,
            "kv_cache_gib": self.kv_cache / GIB,
            "context": float(self.load.context),
            "concurrency": float(self.load.concurrency),
        }

    @property
    def _first(self) -> Stored:
        return next(iter(self.formats.values()))

    def _exported(self, format: str, candidate: str) -> bool:
        column = self.formats[format].choices[:, self.candidates.index(candidate)]
        return bool(np.isfinite(column).any())
