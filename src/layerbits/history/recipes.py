"""The recipes that runs chose, bits against damage."""

from __future__ import annotations

import numpy as np
import pandas as pd

from layerbits.errors import UserError
from layerbits.history.comparison import difference
from layerbits.results.frames import numeric

_DAMAGE = {"predicted_kl": "predicted_kl_chosen", "score": "score_chosen"}


def pareto(runs: pd.DataFrame, by: str = "predicted_kl") -> pd.DataFrame:
    """The recipes that no other beats in bits and in damage, fewest bits first.

    Args:
        runs: Frame of ``history.runs``; one model, method and set of groups, by ``score`` one calibration too.
        by: ``predicted_kl`` (nats per token) or ``score``, summed over the groups that the recipe quantizes.

    Returns:
        Rows of the runs with three columns more: ``bits``, the damage under its name in ``by``, and ``label``, as
        ``figures.pareto`` takes them.

    Raises:
        UserError: The runs are not on one scale, or none has a damage.
    """
    points = _points(runs, by).sort_values(["bits", by], kind="stable")
    best_before = points[by].cummin().shift(fill_value=np.inf)
    return points[points[by] < best_before].reset_index(drop=True)


def best_scheme(runs: pd.DataFrame, max_bits: float, by: str = "predicted_kl") -> pd.Series:
    """The recipe with the least damage among those of at most so many effective bits.

    Args:
        runs: As :func:`pareto` takes them.
        max_bits: Weight storage bits per weight over the searched groups.
        by: ``predicted_kl`` or ``score``.

    Returns:
        The row of its run, with the columns that :func:`pareto` adds.

    Raises:
        UserError: None is as small, or the runs are not on one scale.
    """
    points = _points(runs, by)
    small = points[points["bits"] <= max_bits]
    if small.empty:
        raise UserError(
            f"no recipe has at most {max_bits:g} bits, the smallest has {points['bits'].min():.3f}; "
            "run with a smaller autoquant.effective_bits"
        )
    return small.sort_values([by, "bits"], kind="stable").iloc[0]


def _points(runs: pd.DataFrame, by: str) -> pd.DataFrame:
    if by not in _DAMAGE:
        raise UserError(f"by={by} is not known; choose one of {', '.join(_DAMAGE)}")
    usable = np.isfinite(numeric(runs["effective_bits"])) & np.isfinite(numeric(runs[_DAMAGE[by]]))
    points = runs[usable].reset_index(drop=True)
    if points.empty:
        raise UserError(f"none of {len(runs)} runs has both bits and {by} of its recipe; widen the filter")
    first = points.iloc[0]
    for _, other in points.iloc[1:].iterrows():
        reasons, _ = difference(first, other, by)
        if first["groups"] != other["groups"]:
            reasons += (f"groups: {first['groups']} and {other['groups']}",)
        if reasons:
            raise UserError(
                f"runs {first['run_id']} and {other['run_id']} are not on one scale ({'; '.join(reasons)}); "
                "select runs that are"
            )
    plain = points["granularity"] == "default"
    label = points["quant_pair"].where(plain, points["quant_pair"] + " " + points["granularity"])
    return points.assign(bits=points["effective_bits"], **{by: points[_DAMAGE[by]]}, label=label)
