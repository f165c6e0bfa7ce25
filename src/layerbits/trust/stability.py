"""How far the rankings of several runs agree: over sizes, seeds, datasets, pairs or methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd

from layerbits.errors import UserError
from layerbits.results.bootstrap import FEWEST, LEVEL, TOP, draw, resampled
from layerbits.results.comparable import RANK, differences, facts, reasons
from layerbits.results.result import FloatArray, SensitivityResult

RESAMPLES = 500
COLUMNS = (
    *("a", "b", "differs", "groups", "spearman", "spearman_low", "spearman_high", "kendall", "kendall_low"),
    *("kendall_high", "top", "overlap", "overlap_low", "overlap_high"),
)


_WORDS = {
    "model_revision": "model revision",
    "dtype": "dtype",
    "quant_pair": "pair",
    "granularity": "granularity",
    "config_hash": "config",
    "method": "method",
    "engine": "engine",
    "seed": "seed",
    "dataset": "dataset",
    "dataset_size": "size",
    "dataset_digest": "captions",
    "score_samples": "scored captions",
    "packing": "packing",
    "seq_len": "row length",
    "batch_size": "batch size",
    "device": "device",
}
"""Facts that may differ between runs of one model, in the order in which they are listed, with their short names."""
_DIGESTS = ("model_revision", "config_hash", "dataset_digest")


def stability(results: Mapping[str, SensitivityResult], top: int = TOP, seed: int = 0) -> pd.DataFrame:
    """Each pair of runs: rank correlations and common most sensitive groups, with 90% intervals.

    The interval of a figure says how much it owes to the captions: those of both runs are drawn again, each run's
    alone, and the spread of the figure is put around what was found (drawing adds noise of its own, which alone would
    lower every figure). Where both runs share captions, as sizes of one dataset do, it is wider than need be.

    Args:
        results: Run id → result.
        top: How many of the most sensitive groups are compared.
        seed: Of the draws.

    Returns:
        A row per pair with the columns :data:`COLUMNS`: ``differs`` is what differs between the two, ``groups`` how
        many both have with a finite predicted KL (raw score, where one run has no predicted KL), ``spearman``,
        ``kendall`` (tau-b), and ``overlap`` of the ``top`` groups (NaN where there are no more than that). Ends are NaN
        where a run has too few per-sample scores.

    Raises:
        UserError: Fewer than two runs, or two of them are of different models or have no groups in common, or there
            is no such top.
    """
    if top < 1:
        raise UserError(f"top={top} compares no groups; use 1 or more")
    if len(results) < 2:
        raise UserError("rank stability compares runs with each other: give two or more")
    draws = {run: _drawn(result, seed + i) for i, (run, result) in enumerate(results.items())}
    rows = []
    for a, b in combinations(results, 2):
        one, two = results[a], results[b]
        if reasons(facts(one), facts(two), RANK):
            raise UserError(
                f"runs {a} and {b} are of different models ({one.model.name} and {two.model.name}), whose groups do "
                "not compare; give runs of one model"
            )
        words = difference_words(one, two) or "nothing"
        rows.append({"a": a, "b": b, "differs": words, **_agreement(a, b, one, two, draws, top)})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame of :func:`stability` for reading: each figure with its interval."""

    def with_interval(name: str, form: str) -> list[str]:
        columns = (frame[column] for column in (name, f"{name}_low", f"{name}_high"))
        words = []
        for value, low, high in zip(*columns, strict=True):
            ends = f" ({low:{form}}–{high:{form}})" if math.isfinite(low) else ""
            words.append("–" if math.isnan(value) else f"{value:{form}}{ends}")
        return words

    return pd.DataFrame(
        {
            "a": frame["a"],
            "b": frame["b"],
            "groups": frame["groups"],
            "spearman": with_interval("spearman", ".3f"),
            "kendall": with_interval("kendall", ".3f"),
            "top": frame["top"],
            "in both": with_interval("overlap", ".3g"),
            "differs": frame["differs"],
        }
    )


def difference_words(a: SensitivityResult, b: SensitivityResult) -> str:
    """What differs between two runs of one model, ``name: one and other`` each."""
    pairs = differences(facts(a), facts(b), _WORDS)
    return "; ".join(f"{_WORDS[d.name]}: {_word(d.name, d.a)} and {_word(d.name, d.b)}" for d in pairs)


def spearman(x: FloatArray, y: FloatArray) -> FloatArray:
    """``[n]`` Spearman's rank correlation of each row of two ``[n, G]`` arrays, ties at their mean rank."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=1) for values in (x, y)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))


def kendall(x: FloatArray, y: FloatArray) -> FloatArray:
    """``[n]`` Kendall's tau-b of each row of two ``[n, G]`` arrays."""
    from scipy.stats import kendalltau

    return np.array([kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)])


def overlap(x: FloatArray, y: FloatArray, top: int) -> FloatArray:
    """``[n]`` how many of the ``top`` largest are so in both, for each row of two ``[n, G]`` arrays."""
    inside = []
    for values in (x, y):
        best = np.argsort(-values, axis=1, kind="stable")[:, :top]
        inside.append(np.zeros(values.shape, dtype=bool))
        np.put_along_axis(inside[-1], best, True, axis=1)
    return np.asarray((inside[0] & inside[1]).sum(axis=1), dtype=np.float64)


def around(value: float, drawn: FloatArray, lowest: float, highest: float, level: float = LEVEL) -> tuple[float, float]:
    """An interval of a figure: the percentiles of its resamples, moved so that their median is the figure.

    Args:
        value: The figure.
        drawn: ``[n]`` of the resamples; what is not finite is left out.
        lowest: It cannot be less.
        highest: It cannot be more.
        level: Confidence.
    """
    finite = drawn[np.isfinite(drawn)]
    if not finite.size or not math.isfinite(value):
        return math.nan, math.nan
    low, middle, high = np.quantile(finite, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return max(lowest, value + low - middle), min(highest, value + high - middle)


def _agreement(
    a: str,
    b: str,
    one: SensitivityResult,
    two: SensitivityResult,
    draws: Mapping[str, FloatArray | None],
    top: int,
) -> dict[str, float]:
    known = all(np.isfinite(r.predicted_kl).any() for r in (one, two))
    values = [r.predicted_kl if known else r.scores for r in (one, two)]
    at_b = {g.key: i for i, g in enumerate(two.groups)}
    pairs = [(i, at_b[g.key]) for i, g in enumerate(one.groups) if g.key in at_b]
    pairs = [(i, j) for i, j in pairs if math.isfinite(values[0][i]) and math.isfinite(values[1][j])]
    if len(pairs) < 3:
        count = f"{len(pairs)} groups with a score in common"
        raise UserError(f"runs {a} and {b} have {count}; give runs of the same linears")
    rows = np.array(pairs)
    x, y = values[0][None, rows[:, 0]], values[1][None, rows[:, 1]]
    drawn = draws[a], draws[b]
    numbers: dict[str, float] = {"groups": len(pairs), "top": top}
    statistics: dict[str, tuple[Callable[[FloatArray, FloatArray], FloatArray], float, float]] = {
        "spearman": (spearman, -1, 1),
        "kendall": (kendall, -1, 1),
    }
    if top < len(pairs):
        statistics["overlap"] = (lambda u, v: overlap(u, v, top), 0, top)
    for name, (statistic, lowest, highest) in statistics.items():
        value, ends = float(statistic(x, y)[0]), (math.nan, math.nan)
        if known and drawn[0] is not None and drawn[1] is not None:
            ends = around(value, statistic(drawn[0][:, rows[:, 0]], drawn[1][:, rows[:, 1]]), lowest, highest)
        numbers |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return numbers


def _drawn(result: SensitivityResult, seed: int) -> FloatArray | None:
    """``[RESAMPLES, G]`` predicted KL of resamples; ``None`` where the captions are not known or too few."""
    if result.sample_kl is None or result.sample_tokens is None or len(result.sample_tokens) < FEWEST:
        return None
    tokens: npt.NDArray[np.int64] = result.sample_tokens
    return resampled(result.sample_kl, tokens, draw(len(tokens), RESAMPLES, seed))


def _word(name: str, value: object) -> str:
    word = "unknown" if value is None else str(value)
    return word[:12] if name in _DIGESTS else word
