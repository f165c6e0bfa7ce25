"""Two runs side by side, where their numbers mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from layerbits.errors import UserError
from layerbits.history.query import rows_and_scores
from layerbits.results.comparable import CALIBRATION, PREDICTED_KL, RANK, SCORE, differences, reasons
from layerbits.results.frames import numeric, spearman

BY = ("predicted_kl", "score", "rank")
TOPS = (5, 10, 20)

_RULES = {"rank": RANK, "predicted_kl": PREDICTED_KL}
_WORTH_KNOWING = (
    *("model_revision", "method", "dtype", "engine", "fp4_numerics", "weights", "dataset", "dataset_size"),
    *CALIBRATION,
)


@dataclass(frozen=True)
class Comparison:
    """Two runs, group by group.

    Attributes:
        a: Run id.
        b: Id of the other.
        by: What was compared: ``predicted_kl``, ``score``, or ``rank``, the order of the raw scores alone.
        comparable: Whether it may be compared; if not, all numbers are NaN and the frames empty.
        reasons: Why it may not.
        notes: What else differs or was left out.
        groups: Groups that both have with a finite value.
        spearman: Rank correlation.
        kendall: Kendall's tau-b.
        overlap: For each k of :data:`TOPS` up to ``groups``: how many of the k most sensitive are so in both.
        ratio: Σ b / Σ a over those groups; NaN by rank.
        movers: ``layer``, ``block``, ``kind``, values ``a`` and ``b``, their ``ratio`` b / a, ``rank_a``, ``rank_b``
            among the common groups and ``moved`` = ``rank_b - rank_a``, the largest moves first.
    """

    a: str
    b: str
    by: str
    comparable: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    groups: int
    spearman: float
    kendall: float
    overlap: Mapping[int, int]
    ratio: float
    movers: pd.DataFrame


def compare(a: str, b: str, by: str = "predicted_kl", *, tracking_uri: str | None = None) -> Comparison:
    """Compares two runs where they can be, and says why where they cannot.

    Runs of different models never can. Raw scores are sums over one calibration, so they compare under the same model
    revision, method, captions, packing, sequence length, batch size and sample counts. The predicted KL is in nats
    per token of whatever text it was estimated on: it compares under one model revision and method, and where the
    calibration differs that is a note, for the difference is then partly the text's. The rank of a group needs no
    scale: only the model must be the same.

    Args:
        a: Run id.
        b: Run id.
        by: ``predicted_kl``, ``score`` or ``rank``.
        tracking_uri: The store.

    Raises:
        UserError: The store cannot be read, both are one run, or a run has no scores.
    """
    if by not in BY:
        raise UserError(f"by={by} is not known; choose one of {', '.join(BY)}")
    if a == b:
        raise UserError(f"run {a} is compared with itself; give two runs")
    rows, scores = rows_and_scores((a, b), tracking_uri)
    row_a, row_b = ({str(k): v for k, v in rows.loc[i].items()} for i in (a, b))
    reasons, notes = difference(row_a, row_b, by)
    if reasons:
        return Comparison(a, b, by, False, reasons, notes, 0, math.nan, math.nan, {}, math.nan, _movers(scores[:0]))
    value = "score" if by == "rank" else by
    sides = [scores.loc[scores["run_id"] == i, ["layer", "block", "kind", value]] for i in (a, b)]
    both = sides[0].merge(sides[1][["layer", value]], on="layer", suffixes=("_a", "_b"))
    both = both.rename(columns={f"{value}_a": "a", f"{value}_b": "b"})
    finite = both[np.isfinite(both["a"]) & np.isfinite(both["b"])].reset_index(drop=True)
    lone = len(sides[0]) + len(sides[1]) - 2 * len(both)
    if lone:
        notes += (f"groups in one of the two only: {lone}",)
    if len(finite) < len(both):
        notes += (f"groups without a finite {value}: {len(both) - len(finite)}",)
    x, y = numeric(finite["a"]), numeric(finite["b"])
    movers = _movers(finite)
    tops = {k: int(((movers["rank_a"] <= k) & (movers["rank_b"] <= k)).sum()) for k in TOPS if k <= len(finite)}
    ratio = float(y.sum() / x.sum()) if by != "rank" and x.sum() > 0 else math.nan
    return Comparison(a, b, by, True, (), notes, len(finite), spearman(x, y), _kendall(x, y), tops, ratio, movers)


def difference(a: Mapping[str, object], b: Mapping[str, object], by: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Why two runs (rows of ``history.runs``) do not compare, and what else differs.

    What a run does not say counts as different: nothing shows that it is the same.
    """
    rule = _RULES.get(by, SCORE)
    names = {*rule.same, *_WORTH_KNOWING, "seed"}
    one, two = ({name: None if pd.isna(row[name]) else row[name] for name in names} for row in (a, b))
    why = reasons(one, two, rule)
    if any(reason.name == "model" for reason in why):
        return tuple(map(str, why)), ()
    words = [str(reason) for reason in why]
    if one["weights"] == two["weights"] == "random" and one["seed"] != two["seed"]:
        words.append(f"the weights are random and of other seeds: {one['seed']} and {two['seed']}")
    notes = differences(one, two, [name for name in _WORTH_KNOWING if name not in rule.same])
    return tuple(words), tuple(map(str, notes))


def _movers(both: pd.DataFrame) -> pd.DataFrame:
    columns = ["layer", "block", "kind", "a", "b", "ratio", "rank_a", "rank_b", "moved"]
    if both.empty:
        return pd.DataFrame(columns=columns)
    ranks = {f"rank_{side}": both[side].rank(ascending=False, method="first").astype(int) for side in "ab"}
    frame = both.assign(ratio=both["b"] / both["a"].where(both["a"] != 0), **ranks)
    frame["moved"] = frame["rank_b"] - frame["rank_a"]
    order = frame["moved"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order, columns].reset_index(drop=True)


def _kendall(x: pd.Series, y: pd.Series) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic) if len(x) >= 3 else math.nan
