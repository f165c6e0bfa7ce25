"""How sure a ranking is, from the captions that it was measured on, drawn again with replacement.

The predicted KL of a group is a ratio of sums over captions, ``Σ_s x_s / Σ_s n_s`` with ``n_s`` loss tokens and
``x_s = T · sample_kl_s``, ``T = Σ_s n_s``. A resample weighs each caption by how often it was drawn, in both sums, for
all groups at once: groups keep what they have in common, so that the order of two is surer than either.

What this holds fixed: the activation ranges, the model, the quantization. Captions count as independent; in packed
rows a caption's share has a little of its neighbours' loss in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from layerbits.results.intervals import Intervals
from layerbits.results.result import FloatArray, SensitivityResult

LEVEL = 0.9
SUPPORTED = 0.95
"""The share of resamples in which one group must beat another for their order to count as supported."""
TOP = 10
RESAMPLES = 2000
FEWEST = 8
"""Captions below which there is nothing to draw from."""
_FARTHEST = 32  # times as many captions: farther out, the gaps between groups are mostly chance themselves


def with_intervals(result: SensitivityResult) -> SensitivityResult:
    """The result with intervals from its per-sample scores; unchanged where those are not known or too few."""
    if result.sample_kl is None or result.sample_tokens is None:
        return result
    return replace(result, intervals=intervals(result.sample_kl, result.sample_tokens))


def intervals(
    sample_kl: FloatArray,
    sample_tokens: npt.NDArray[np.int64],
    *,
    level: float = LEVEL,
    top: int = TOP,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals | None:
    """Intervals of the predicted KL, ties and with them ranges of the rank, and how stable the top of the ranking is.

    Two groups are tied where neither beats the other in 95% of the resamples. The rank of a group then lies between
    one more than the groups that surely beat it, and as many less than all as it surely beats.

    Args:
        sample_kl: ``[S, G]`` share of each caption in the predicted KL; may be negative. Groups with a share that is
            not finite have no interval.
        sample_tokens: ``[S]`` loss tokens of each caption.
        level: Confidence of the intervals of the predicted KL.
        top: Groups that :attr:`Intervals.top_overlap` is about.
        resamples: How often the captions are drawn.
        seed: Of the draws.

    Returns:
        ``None`` where fewer than :data:`FEWEST` captions have a share.
    """
    kept = (sample_tokens > 0) | (sample_kl != 0).any(axis=1)
    kl, tokens = sample_kl[kept], sample_tokens[kept]
    captions, groups = kl.shape
    if captions < FEWEST:
        return None
    weights = draw(captions, resamples, seed)
    low, high = np.full((2, groups), np.nan)
    rank_low, rank_high = np.zeros((2, groups), dtype=np.int64)
    tied: list[tuple[int, ...]] = [()] * groups
    overlap, needed = math.nan, math.nan
    known = np.flatnonzero(np.isfinite(kl).all(axis=0))
    if known.size:
        shares = kl[:, known]
        center, drawn = shares.sum(axis=0), resampled(shares, tokens, weights)
        low[known], high[known] = _ends(shares, tokens, weights, drawn, level)
        unsure, above = ties(drawn, center)
        for g, those in zip(known, unsure, strict=True):
            tied[g] = tuple(known[those].tolist())
        rank_low[known] = 1 + above
        rank_high[known] = 1 + above + [len(those) for those in unsure]
        if len(known) > top:
            noise = drawn - drawn.mean(axis=0)
            overlap = top_overlap(center, noise, top, 1.0)
            needed = captions_for(center, noise, top, captions)
    return Intervals(level, captions, low, high, rank_low, rank_high, tuple(tied), top, overlap, needed)


def draw(captions: int, resamples: int, seed: int) -> FloatArray:
    """``[resamples, captions]`` how often each caption is drawn: each row sums to the number of captions."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(captions, np.full(captions, 1 / captions), size=resamples).astype(np.float64)


def resampled(kl: FloatArray, tokens: npt.NDArray[np.int64], weights: FloatArray) -> FloatArray:
    """``[resamples, G]`` predicted KL of each resample.

    Args:
        kl: ``[S, G]`` shares of the captions.
        tokens: ``[S]`` loss tokens.
        weights: From :func:`draw`.
    """
    drawn: FloatArray = (weights @ kl) * (tokens.sum() / _counted(tokens, weights))[:, None]
    return drawn


def standard_error(sums: Sequence[float] | FloatArray, tokens: Sequence[int] | FloatArray) -> tuple[float, float]:
    """Mean per token and its standard error, where captions are what was drawn and not tokens.

    A mean over tokens is the ratio of two sums over captions; its variance is that of a ratio estimator (Cochran,
    *Sampling Techniques*, 3rd edition 1977, chapter 6). Tokens of one caption are not independent, so that their
    scatter over ``√tokens`` would be too small.

    Args:
        sums: ``[captions]`` the value summed over the tokens of each caption.
        tokens: ``[captions]`` tokens of each.

    Returns:
        The mean, and its standard error, NaN with fewer than two captions.
    """
    values, counts = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    mean = float(values.sum() / counts.sum())
    if len(values) < 2:
        return mean, math.nan
    residual = values - mean * counts
    scale = len(values) / (len(values) - 1)
    return mean, float(np.sqrt(scale * (residual @ residual)) / counts.sum())


def ties(drawn: FloatArray, center: FloatArray) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """What is known of the order of groups.

    Args:
        drawn: ``[resamples, G]`` predicted KL of resamples.
        center: ``[G]`` predicted KL.

    Returns:
        For each group the positions of those whose order against it is not supported, most sensitive first; and
        ``[G]`` how many surely beat it.
    """
    columns = np.ascontiguousarray(drawn.T)
    order = np.argsort(-center, kind="stable")
    tied: list[list[int]] = [[] for _ in order]
    above = np.zeros(len(order), dtype=np.int64)
    for i, a in enumerate(order.tolist()):
        later = order[i + 1 :]
        wins, losses = (columns[a] > columns[later]).mean(axis=1), (columns[a] < columns[later]).mean(axis=1)
        above[later[wins >= SUPPORTED]] += 1
        above[a] += int((losses >= SUPPORTED).sum())
        for b in later[np.maximum(wins, losses) < SUPPORTED].tolist():
            tied[a].append(b)
            tied[b].append(a)
    place = np.argsort(order)
    return [np.array(sorted(those, key=lambda g: place[g]), dtype=np.int64) for those in tied], above


def top_overlap(center: FloatArray, noise: FloatArray, top: int, scale: float) -> float:
    """How many of their ``top`` groups two independent calibrations would have in common, on average.

    What they scatter around is not known better than one calibration tells, so it is drawn too.

    Args:
        center: ``[G]`` predicted KL.
        noise: ``[resamples, G]`` deviations from it.
        top: How many groups.
        scale: Of the noise of the two: with ``m`` times as many captions ``1 / √m``.
    """
    third = len(noise) // 3
    true = center + noise[:third]
    best = []
    for part in (noise[third : 2 * third], noise[2 * third : 3 * third]):
        values = true + part * scale
        inside = np.zeros(values.shape, dtype=bool)
        np.put_along_axis(inside, np.argpartition(-values, top - 1, axis=1)[:, :top], True, axis=1)
        best.append(inside)
    return float((best[0] & best[1]).sum(axis=1).mean())


def captions_for(center: FloatArray, noise: FloatArray, top: int, captions: int) -> float:
    """How many captions two calibrations need to have all but one of their ``top`` groups in common, on average.

    The variance of a ratio of sums over ``m`` captions goes with ``1 / m``, so the noise of the resamples is scaled by
    its root, and the smallest such ``m`` is found by bisection.

    Args:
        center: ``[G]`` predicted KL.
        noise: ``[resamples, G]`` deviations from it on ``captions`` captions.
        top: How many groups.
        captions: Captions of the resamples.

    Returns:
        A whole number of 2 or more; infinite where 32 times ``captions`` would not do.
    """

    def stable(count: int) -> bool:
        return top_overlap(center, noise, top, math.sqrt(captions / count)) >= top - 1

    enough = captions * _FARTHEST
    if not stable(enough):
        return math.inf
    few = 1
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if stable(middle) else (middle, enough)
    return float(enough)


def _ends(
    kl: FloatArray, tokens: npt.NDArray[np.int64], weights: FloatArray, drawn: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    """``[G]`` low and high ends, studentized bootstrap (Efron, Tibshirani, An Introduction to the Bootstrap, 12.5).

    Each resample's distance from the estimate is counted in its own standard error (of a ratio of sums, by
    linearisation), which is what makes up for few captions and for the long tail of what a caption adds. Where one
    caption makes most of a sum, that may lead far out; no end is beyond the lowest or highest single caption.
    """
    center, total = kl.sum(axis=0), tokens.sum()
    x, n = kl * total, tokens[:, None].astype(np.float64)
    squares = weights @ (x * x) - 2 * drawn * (weights @ (x * n)) + drawn**2 * (weights @ (n * n))
    error = np.sqrt(np.maximum(squares, 0.0)) / _counted(tokens, weights)[:, None]
    distance = np.divide(drawn - center, error, out=np.zeros_like(drawn), where=error > 0)
    own = np.sqrt(((x - center * n) ** 2).sum(axis=0)) / total
    near, far = np.quantile(distance, [(1 - level) / 2, (1 + level) / 2], axis=0)
    single = x[tokens > 0] / n[tokens > 0]
    lowest, highest = np.minimum(single.min(axis=0), center), np.maximum(single.max(axis=0), center)
    return np.maximum(center - far * own, lowest), np.minimum(center - near * own, highest)


def _counted(tokens: npt.NDArray[np.int64], weights: FloatArray) -> FloatArray:
    """``[resamples]`` loss tokens of each; 1 where only captions without any were drawn."""
    return np.maximum(weights @ tokens, 1.0)
