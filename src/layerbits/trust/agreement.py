"""How far a predicted ranking and its magnitudes agree with measured damage, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from layerbits.results.bootstrap import TOP
from layerbits.results.result import FloatArray
from layerbits.trust.stability import around, kendall, overlap, spearman

RESAMPLES = 400


@dataclass(frozen=True)
class Estimate:
    """A figure with the bounds of its 90% bootstrap interval; NaN where there was nothing to compare."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–"
        known = f" ({self.low:.2f}–{self.high:.2f})" if math.isfinite(self.low) else ""
        return f"{self.value:.2f}{known}"


@dataclass(frozen=True)
class Captions:
    """What each caption contributes to a mean per token.

    Attributes:
        kl: ``[S, G]`` nats, summed over a caption's tokens; for a prediction on any common scale.
        tokens: ``[S]`` loss tokens.
    """

    kl: FloatArray
    tokens: FloatArray

    @property
    def mean(self) -> FloatArray:
        """``[G]`` nats per token."""
        return self.kl.sum(axis=0) / self.tokens.sum()

    def resampled(self, generator: np.random.Generator, times: int) -> FloatArray:
        """``[times, G]`` means over captions drawn with replacement."""
        count = len(self.tokens)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=times).astype(float)
        # a caption can have no loss token; a draw of such captions alone has no mean
        return weights @ self.kl / np.maximum(weights @ self.tokens, 1)[:, None]


@dataclass(frozen=True)
class Agreement:
    """A prediction against the measurement, over ``groups`` groups that both have.

    Attributes:
        top: Groups among the :data:`TOP` most sensitive of both (or all, of fewer groups).
        median_ratio: Median of measured / predicted; NaN for a ranker without a unit.
        within_2x: Share of the groups whose ratio is between ½ and 2; NaN likewise.
    """

    groups: int
    spearman: Estimate
    kendall: Estimate
    top: Estimate
    median_ratio: Estimate
    within_2x: Estimate


def agreement(
    predicted: FloatArray,
    measured: Captions,
    keep: FloatArray,
    in_nats: bool,
    predicted_samples: Captions | None = None,
    seed: int = 0,
) -> Agreement:
    """Compares a prediction with a measurement.

    Args:
        predicted: ``[G]``.
        measured: Of held-out captions.
        keep: ``[G]`` bool: groups to compare (finite, above the noise floor).
        in_nats: Whether the prediction is in nats per token; ratios make sense only then.
        predicted_samples: What the prediction is the mean of, to be resampled too.
        seed: Of the resampling.
    """
    rows = np.flatnonzero(keep & np.isfinite(predicted))
    truth, guess = measured.mean[rows], predicted[rows]
    generator = np.random.default_rng(seed)
    truths = measured.resampled(generator, RESAMPLES)[:, rows]
    if predicted_samples is None:
        guesses = np.broadcast_to(guess, truths.shape)
    else:
        guesses = predicted_samples.resampled(generator, RESAMPLES)[:, rows]

    def estimate(statistic: Callable[[FloatArray, FloatArray], float], best: float = 1.0) -> Estimate:
        if len(rows) < 3:
            return Estimate(math.nan)
        drawn = [statistic(g, t) for g, t in zip(guesses, truths, strict=True)]
        value = statistic(guess, truth)
        return Estimate(value, *around(value, np.array(drawn), -math.inf, best))

    unknown = Estimate(math.nan)
    return Agreement(
        groups=len(rows),
        spearman=estimate(_one(spearman)),
        kendall=estimate(_one(kendall)),
        top=estimate(_one(partial(overlap, top=TOP)), TOP),
        median_ratio=estimate(_median_ratio, math.inf) if in_nats else unknown,
        within_2x=estimate(_within_2x) if in_nats else unknown,
    )


def _one(statistic: Callable[[FloatArray, FloatArray], FloatArray]) -> Callable[[FloatArray, FloatArray], float]:
    """A statistic of many pairs of rows as one of a single pair."""
    return lambda a, b: float(statistic(a[None], b[None])[0])


def _ratio(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(measured / predicted)


def _median_ratio(predicted: FloatArray, measured: FloatArray) -> float:
    return float(np.nanmedian(_ratio(predicted, measured)))


def _within_2x(predicted: FloatArray, measured: FloatArray) -> float:
    ratio = _ratio(predicted, measured)
    return float(((ratio > 0.5) & (ratio < 2)).mean())
