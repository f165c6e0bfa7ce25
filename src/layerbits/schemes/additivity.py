"""What a sum of predicted KLs is worth: measured schemes say by what factor the sum of another scheme is off.

Damages of groups do not quite add up, and scores are not quite in nats: schemes of one pair measure about the same
multiple of their sums. Three measured schemes or more give that factor, as a mean of logarithms, and by their scatter
how far the next scheme may be from it. It holds for the same candidates and for budgets between those that were
measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerbits.errors import UserError
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
    """Measured / predicted of schemes of some candidates, from ``low`` to ``high`` effective bits.

    Attributes:
        value: Geometric mean.
        error: Standard error of a further scheme's from it, relative: the scatter of the schemes, which has the error
            of their measured KLs in it.
        schemes: How many were measured.
        left_out: Mean |log| by which the sum of a scheme is off, and by which the product is where the factor is of
            the other schemes: what the factor gains.
    """

    candidates: tuple[str, ...]
    low: float
    high: float
    value: float
    error: float
    schemes: int
    left_out: tuple[float, float]

    def covers(self, scheme: Scheme) -> bool:
        """Whether it says something of a scheme."""
        names = tuple(sorted(c.name for c in scheme.candidates))
        return names == self.candidates and self.low - 1e-6 <= scheme.effective_bits <= self.high + 1e-6

    @property
    def words(self) -> str:
        """In a sentence."""
        before, after = (f"{math.expm1(off):.0%}" for off in self.left_out)
        return (
            f"{' + '.join(self.candidates)}, {self.low:.2f} to {self.high:.2f} bits: a scheme measures "
            f"{self.value:.2f} (± {self.error:.0%}) of its summed prediction, by {self.schemes} schemes. A sum alone "
            f"is off by {before}, with the factor of the other schemes by {after}."
        )


def factors(points: Iterable[Point]) -> list[Factor]:
    """A factor for each set of candidates with :data:`FEWEST` measured schemes or more."""
    grouped: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        if point.predicted > 0 and point.measured > 0 and point.candidates:
            grouped.setdefault(point.candidates, []).append(point)
    return [_factor(names, those) for names, those in grouped.items() if len(those) >= FEWEST]


def _factor(names: tuple[str, ...], points: Sequence[Point]) -> Factor:
    logs = np.log([p.measured / p.predicted for p in points])
    count, mean = len(logs), float(logs.mean())
    scatter = float(logs.std(ddof=1)) * math.sqrt(1 + 1 / count)
    others = (logs.sum() - logs) / (count - 1)
    return Factor(
        candidates=names,
        low=min(p.bits for p in points),
        high=max(p.bits for p in points),
        value=math.exp(mean),
        error=math.expm1(scatter),
        schemes=count,
        left_out=(float(np.abs(logs).mean()), float(np.abs(logs - others).mean())),
    )


def expected(scheme: Scheme, known: Sequence[Factor]) -> tuple[float, float] | None:
    """The KL of a scheme by its sum and the factor, and the standard error of that; ``None`` where there is none.

    A KV cache is not in it.
    """
    for factor in known:
        if factor.covers(scheme) and math.isfinite(scheme.predicted_kl):
            kl = scheme.predicted_kl * factor.value
            return kl, kl * factor.error
    return None


def points_of(probe: Mapping[str, Any]) -> list[Point]:
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


def _known(scheme: Mapping[str, Any]) -> bool:
    return scheme["predicted_kl"] is not None and scheme["difference"]["kl"] is not None


def load_factors(reference: str, tracking_uri: str | None, revision: str) -> list[Factor]:
    """The factors of a probe.

    Args:
        reference: Run id, folder or ``probe.json`` of a probe.
        tracking_uri: The store of the run.
        revision: Of the model that schemes are made for.

    Raises:
        UserError: There is no such probe, it is of another revision, or it measured too few schemes of any candidates.
    """
    path = Path(reference)
    if path.exists() or "/" in reference:
        path = path / "probe.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"no probe at {path}; give the folder of a probe, or its run id") from None
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); give the folder of a probe, or its run id") from None
    else:
        from layerbits.history.derived import artifact

        data = json.loads(artifact(reference, "probe.json", tracking_uri))
    points = points_of(data)
    if (of := data["model"]["revision"]) != revision:
        raise UserError(
            f"{reference} probed revision {of}, the schemes are for {revision}; probe schemes of these runs"
        )
    found = factors(points)
    if not found:
        raise UserError(
            f"{reference} measured {len(points)} schemes, and fewer than {FEWEST} of the same candidates; probe three "
            "budgets or more (effective_bits=…)"
        )
    return found


def to_json(known: Sequence[Factor]) -> list[dict[str, Any]]:
    """Plain JSON data."""
    return [asdict(factor) for factor in known]
