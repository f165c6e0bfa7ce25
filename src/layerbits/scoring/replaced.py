"""The scored modules with their quantizers, to be run in place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from layerbits.scoring.search import Search
from layerbits.scoring.suffix import Perturbation
from layerbits.scoring.tap import Tap
from layerbits.scoring.taps import Taps


class ReplacedLinears(Taps):
    """Makes perturbations of groups; calibrate, and load the ranges, before one of them runs."""

    def perturbations(self, search: Search) -> list[Perturbation]:
        """One per group and candidate, candidates of a group side by side."""
        return [self.quantized(search, g, c) for g in range(len(search.groups)) for c in range(len(self._pairs))]

    def quantized(self, search: Search, group: int, candidate: int) -> Perturbation:
        """The modules of a group, quantized by a candidate."""
        return {tap.name: tap.quantized(self._pairs[candidate]) for tap in self._members(search, group)}

    def recomputed(self, search: Search, group: int) -> Perturbation:
        """The modules of a group unquantized, summed in another order: what differs is rounding alone."""
        return {tap.name: tap.recomputed() for tap in self._members(search, group)}

    def unchanged(self, search: Search, group: int) -> Perturbation:
        """The modules of a group as they are."""
        return {tap.name: tap.module.forward for tap in self._members(search, group)}

    def weight_error(self, name: str, candidate: int) -> float:
        """Squared error of a module's weights as a candidate quantizes them, summed."""
        tap = next(t for t in self.taps if t.name == name)
        pairs = zip(tap.weights(self._pairs[candidate][0]), tap.weights(None), strict=True)
        return sum(float((quantized - weight).float().square().sum()) for quantized, weight in pairs)

    def _members(self, search: Search, group: int) -> Iterator[Tap]:
        return (self.taps[m] for m in np.flatnonzero(search.group_of == group).tolist())
