"""What a sum of predicted KLs is worth: measured schemes say by what factor the sum of another scheme is off.

Damages of groups do not quite add up, scores are not quite in nats, and a solver prefers groups whose scores are too
low, so that the sum of what it chose is too low as well: the fewer groups it takes, the more. So the factor is one of
the budget: between two measured schemes its logarithm is a straight line over the effective bits. Three measured
schemes or more say how far that is off: by how much each scheme lies beside the line of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from layerbits.errors import UserError
from layerbits.plain import JsonMapping
from layerbits.schemes.scheme import Scheme

FEWEST = 3
"""Schemes below which there is no scatter to speak of."""


@dataclass(frozen=True)
class Point:
    """A measured scheme.

    Attributes:
        scheme: Its name.
        candidates: Names of the candidates that it uses, sorted.
        bits: Its effective bits.
        predicted: Sum of its predicted KLs, nats per token. measured: Its KL. error: Standard error of that.
    """

    scheme: str
    candidates: tuple[str, ...]
    bits: float
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True)
class Factor:
    """Measured / predicted of schemes of some candidates, over effective bits; ``n`` measured budgets.

    Attributes:
        bits: ``[n]`` ascending.
        values: ``[n]`` measured / predicted there.
        error: Standard error of a further scheme's from it, relative: the schemes beside the lines of their
            neighbours, and the error of their measured KLs.
        schemes: How many were measured.
        left_out: Mean |log| by which the sum of a scheme between two others is off, and by which the product with
            their factor is: what the factor gains.
    """

    candidates: tuple[str, ...]
    bits: tuple[float, ...]
    values: tuple[float, ...]
    error: float
    schemes: int
    left_out: tuple[float, float]

    def covers(self, scheme: Scheme) -> bool:
        """Whether it says something of a scheme."""
        names = tuple(sorted(c.name for c in scheme.candidates))
        inside = self.bits[0] - 1e-6 <= scheme.effective_bits <= self.bits[-1] + 1e-6
        return names == self.candidates and inside

    def at(self, bits: float) -> float:
        """The factor at effective bits."""
        return float(np.exp(np.interp(bits, self.bits, np.log(self.values))))

    @property
    def words(self) -> str:
        """In a sentence."""
        before, after = (f"{math.expm1(off):.0%}" for off in self.left_out)
        spread = f"{min(self.values):.2f} to {max(self.values):.2f}"
        return (
            f"{' + '.join(self.candidates)}, {self.bits[0]:.2f} to {self.bits[-1]:.2f} bits: a scheme measures "
            f"{spread} times its summed prediction (± {self.error:.0%} between the measured budgets), by "
            f"{self.schemes} schemes. A sum alone is off by {before}, with the factor of the neighbours by {after}."
        )


def factors(points: Iterable[Point]) -> list[Factor]:
    """A factor for each set of candidates with :data:`FEWEST` measured budgets or more."""
    grouped: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        if point.predicted > 0 and point.measured > 0 and point.candidates:
            grouped.setdefault(point.candidates, []).append(point)
    made = (_factor(names, those) for names, those in grouped.items())
    return [factor for factor in made if factor is not None]


def _factor(names: tuple[str, ...], points: Sequence[Point]) -> Factor | None:
    by_bits: dict[float, list[float]] = {}
    for point in sorted(points, key=lambda p: p.bits):
        by_bits.setdefault(round(point.bits, 6), []).append(math.log(point.measured / point.predicted))
    if len(by_bits) < FEWEST:
        return None
    bits, logs = np.array(list(by_bits)), np.array([float(np.mean(those)) for those in by_bits.values()])
    inner = range(1, len(bits) - 1)
    beside = np.array([logs[i] - np.interp(bits[i], np.delete(bits, i), np.delete(logs, i)) for i in inner])
    own = float(np.mean([(p.error / p.measured) ** 2 for p in points]))
    return Factor(
        candidates=names,
        bits=tuple(bits.tolist()),
        values=tuple(np.exp(logs).tolist()),
        error=math.expm1(math.sqrt(float((beside**2).mean()) + own)),
        schemes=len(points),
        left_out=(float(np.abs(logs[1:-1]).mean()), float(np.abs(beside).mean())),
    )


def expected(scheme: Scheme, known: Sequence[Factor]) -> tuple[float, float] | None:
    """The KL of a scheme by its sum and the factor, and the standard error of that; ``None`` where there is none.

    A KV cache is not in it.
    """
    for factor in known:
        if factor.covers(scheme) and math.isfinite(scheme.predicted_kl):
            kl = scheme.predicted_kl * factor.at(scheme.effective_bits)
            return kl, kl * factor.error
    return None


def points_of(probe: JsonMapping) -> list[Point]:
    """The schemes of a ``probe.json``, without controls and without those that have a KV cache.

    Raises:
        UserError: It is no record of a probe.
    """
    try:
        return [
            Point(
                s["scheme"],
                tuple(sorted(s["candidates"])),
                s["effective_bits"],
                s["predicted_kl"],
                s["difference"]["kl"],
                s["difference"]["kl_se"] or 0.0,
            )
            for s in probe["schemes"]
            if s["control_of"] is None and s.get("kv_cache", "none") == "none" and _known(s)
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"this is no record of a probe that says its candidates ({error!r}); probe again") from None


def _known(scheme: JsonMapping) -> bool:
    return scheme["predicted_kl"] is not None and scheme["difference"]["kl"] is not None


def factors_of(probe: JsonMapping, name: str, revision: str) -> list[Factor]:
    """The factors that a probe measured.

    Args:
        probe: Its ``probe.json``.
        name: What messages call it.
        revision: Of the model that schemes are made for.

    Raises:
        UserError: It is no record of a probe, of another revision, or it measured too few schemes of any candidates.
    """
    points = points_of(probe)
    if (of := probe["model"]["revision"]) != revision:
        raise UserError(f"{name} probed revision {of}, the schemes are for {revision}; probe schemes of these runs")
    made = factors(points)
    if not made:
        raise UserError(
            f"{name} measured {len(points)} schemes, and fewer than {FEWEST} of the same candidates; probe three "
            "budgets or more (effective_bits=…)"
        )
    return made


def to_json(known: Sequence[Factor]) -> list[dict[str, object]]:
    """Plain JSON data."""
    return [asdict(factor) for factor in known]
