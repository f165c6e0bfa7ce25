"""Two models on the same questions, compared question by question (no torch).

A question is right or wrong under each model. Only questions that changed tell the models apart: ``lost`` (right
before, wrong now) and ``won``. With ``n`` questions the difference of the accuracies is ``(won - lost) / n``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from layerbits.results.result import FloatArray

LEVEL = 0.95
"""Of all intervals; tests are at ``1 - LEVEL``."""
POWER = 0.8
"""Of the difference that could have been shown."""
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Interval:
    """A difference with both ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Questions by what two models made of them.

    Attributes:
        both: Right under both.
        lost: Right under the first alone.
        won: Right under the second alone.
        neither: Wrong under both.
    """

    both: int
    lost: int
    won: int
    neither: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Counts ``[n]`` answers of two models, in the same order.

        Raises:
            ValueError: There are not as many of both, or none.
        """
        if len(before) != len(after) or not len(before):
            raise ValueError(f"{len(before)} and {len(after)} answers are no pairs")
        a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
        return cls(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))

    @property
    def n(self) -> int:
        """Questions."""
        return self.both + self.lost + self.won + self.neither

    @property
    def accuracies(self) -> tuple[float, float]:
        """Shares of right answers of the first and the second model."""
        return (self.both + self.lost) / self.n, (self.both + self.won) / self.n

    @property
    def p_value(self) -> float:
        """Exact McNemar test that as many answers are lost as are won, two-sided.

        A binomial test of the changed answers (McNemar, *Psychometrika* 12, 1947, in its exact form); 1 without any.
        """
        changed = self.lost + self.won
        return float(stats.binomtest(self.lost, changed, 0.5).pvalue) if changed else 1.0

    @property
    def difference(self) -> Interval:
        """Second accuracy minus first, with the paired interval at :data:`LEVEL`.

        The adjusted Wald interval of Bonett and Price (*Statistics in Medicine* 31, 2012, 479-488), which keeps its
        level with few changed answers: one is added to each kind of change and two to ``n``.
        """
        lost, won = (self.lost + 1) / (self.n + 2), (self.won + 1) / (self.n + 2)
        middle, half = won - lost, _Z * math.sqrt((won + lost - (won - lost) ** 2) / (self.n + 2))
        return Interval((self.won - self.lost) / self.n, max(-1.0, middle - half), min(1.0, middle + half))

    @property
    def unpaired_width(self) -> float:
        """Width of the interval of two independent accuracies, as from the standard errors that the harness reports."""
        errors = [p * (1 - p) / (self.n - 1) for p in self.accuracies] if self.n > 1 else [math.nan]
        return 2 * _Z * math.sqrt(sum(errors))

    def detectable(self, level: float = 1 - LEVEL) -> float:
        """Smallest difference that this many questions would have shown with probability :data:`POWER`.

        Args:
            level: Level of the test.
        """
        noise = 2 * min(self.lost, self.won) / self.n
        return detectable(self.n, noise, level)


def power(n: int, lost: float, won: float, level: float = 1 - LEVEL) -> float:
    """Probability that the exact McNemar test tells two models apart.

    The changed answers are binomial, and of those the lost ones too; summed over both, nothing is approximated. (The
    usual formula, Connor, *Biometrics* 43, 1987, 207-211, is the normal limit of it.)

    Args:
        n: Questions.
        lost: Probability that an answer is lost.
        won: Probability that one is won.
        level: Level of the test.
    """
    rate = lost + won
    if rate <= 0:
        return 0.0
    changed = np.arange(n + 1)
    weights = stats.binom.pmf(changed, n, min(rate, 1.0))
    near = weights > 1e-12
    changed, weights = changed[near], weights[near]
    # Most that may be on the smaller side: twice the tail is at most the level.
    most = stats.binom.ppf(level / 2, changed, 0.5)
    most = np.where(stats.binom.cdf(most, changed, 0.5) * 2 > level, most - 1, most)
    share = lost / rate
    detected = stats.binom.cdf(most, changed, share) + stats.binom.cdf(most, changed, 1 - share)
    return float((weights * np.where(most < 0, 0.0, detected)).sum())


def detectable(n: int, noise: float = 0.0, level: float = 1 - LEVEL) -> float:
    """Smallest loss of accuracy that an exact McNemar test of ``n`` questions shows with probability :data:`POWER`.

    Args:
        n: Questions.
        noise: Share of answers that change for no reason, half of them each way.
        level: Level of the test.

    Returns:
        A share of the questions; NaN where no loss would do.
    """
    low, high = 0.0, 1.0 - noise
    if power(n, noise / 2 + high, noise / 2, level) < POWER:
        return math.nan
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, noise / 2 + middle, noise / 2, level) >= POWER else (middle, high)
    return high


def fewest(level: float = 1 - LEVEL) -> int:
    """Fewest questions of which any number of lost answers could be told from chance."""
    return math.ceil(1 - math.log2(level))


def mean_interval(changes: Sequence[float] | FloatArray) -> Interval:
    """Mean of paired changes with its t interval at :data:`LEVEL`; both ends NaN with fewer than two."""
    values = np.asarray(changes, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values adjusted for being several (Holm, *Scandinavian Journal of Statistics* 6, 1979, 65-70)."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return tuple(float(p) for p in adjusted)


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        paired: The counts.
        p_value: Exact McNemar.
        adjusted: The same after Holm, over all comparisons of the evaluation.
        difference: Second accuracy minus first.
        detectable: Smallest difference that would have been seen with probability :data:`POWER`, at the level that the
            strictest of Holm's steps leaves each comparison.
        margin: Loss of accuracy that is allowed; ``None`` = not asked.
        log_odds: Mean change of the right answer's log-odds, where the answers have likelihoods.
    """

    paired: Paired
    p_value: float
    adjusted: float
    difference: Interval
    detectable: float
    margin: float | None
    log_odds: Interval | None

    @property
    def kind(self) -> str:
        """``worse``, ``better`` or ``no difference seen``, at the adjusted p-value."""
        if self.adjusted > 1 - LEVEL:
            return "no difference seen"
        return "worse" if self.difference.value < 0 else "better"

    @property
    def within_margin(self) -> bool | None:
        """Whether the loss is shown to be below the margin: the interval ends above it; ``None`` = not asked.

        The upper 97.5% bound of the loss, as non-inferiority trials take it (ICH E9, 1998, section 3.3.2). Not
        adjusted for the number of comparisons.
        """
        return None if self.margin is None else self.difference.low > -self.margin

    @property
    def words(self) -> str:
        """One phrase."""
        low, high = self.difference.low, self.difference.high
        if self.kind == "worse":
            said = f"worse by {points(max(-high, 0))}–{points(-low)} points"
        elif self.kind == "better":
            said = f"better by {points(max(low, 0))}–{points(high)} points"
        elif math.isnan(self.detectable):
            said = "no difference seen (too few questions to see any)"
        else:
            said = f"no difference seen (would see ≥ {points(self.detectable)} points)"
        if self.margin is not None:
            end = "not worse than" if self.within_margin else "not shown to be within"
            said += f"; {end} margin of {points(self.margin)} points"
        return said

    def to_json(self) -> dict[str, object]:
        """Plain data, with the verdict in words."""
        return {**asdict(self), "verdict": self.kind, "within_margin": self.within_margin, "words": self.words}


def judge(
    pairs: Mapping[tuple[str, str], Paired],
    log_odds: Mapping[tuple[str, str], Sequence[float]],
    margin: float | None = None,
) -> dict[tuple[str, str], Verdict]:
    """Verdicts on several comparisons at once.

    Args:
        pairs: (task, scheme) → counts.
        log_odds: (task, scheme) → ``[n]`` changes of the right answers' log-odds, where there are any.
        margin: Loss of accuracy that is allowed.
    """
    adjusted = dict(zip(pairs, holm([p.p_value for p in pairs.values()]), strict=True))
    level = (1 - LEVEL) / max(len(pairs), 1)
    return {
        key: Verdict(
            paired=paired,
            p_value=paired.p_value,
            adjusted=adjusted[key],
            difference=paired.difference,
            detectable=paired.detectable(level),
            margin=margin,
            log_odds=mean_interval(log_odds[key]) if key in log_odds else None,
        )
        for key, paired in pairs.items()
    }


def points(share: float) -> str:
    """A share in percentage points, as few digits as tell it."""
    return f"{100 * share:.2g}" if abs(share) < 0.1 else f"{100 * share:.0f}"
