"""What schemes do to answers against what they do to the distributions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from layerbits.figures.style import (
    BLACK,
    FONT,
    LineStyle,
    headline,
    key,
    label_outer,
    legend_below,
    line_style,
    log_scale,
    panels,
    plain_axes,
    spans,
)
from layerbits.results.frames import numeric

_COLUMNS = 3
_TWO_SIDES = 1.96


def answers(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Accuracy difference against measured KL with both intervals at 95%, a panel per task.

    Args:
        frame: Columns ``task``, ``label`` (rows that share one share a colour), ``kl``, ``kl_se`` (nats per token),
            ``difference``, ``difference_low`` and ``difference_high`` (shares).
        title: Above the figure.

    Raises:
        ValueError: No row has a finite KL and difference.
    """
    usable = np.isfinite(numeric(frame["kl"])) & np.isfinite(numeric(frame["difference"]))
    shown = frame[usable]
    if shown.empty:
        raise ValueError("no row has both kl and difference; check the filter that made the frame")
    tasks = list(dict.fromkeys(shown["task"].astype(str)))
    labels = list(dict.fromkeys(shown["label"].astype(str)))
    styles: dict[str, LineStyle] = {label: {**line_style(i), "linestyle": ""} for i, label in enumerate(labels)}
    columns = min(_COLUMNS, len(tasks))
    figure, axes = panels(len(tasks), columns, 4.0 * columns + 0.5, 3.0)
    kl = numeric(shown["kl"])
    logarithmic = spans(kl) and bool((kl > 0).all())
    for ax, task in zip(axes, tasks, strict=False):
        for label in labels:
            part = shown[(shown["task"].astype(str) == task) & (shown["label"].astype(str) == label)]
            if part.empty:
                continue
            x, y = numeric(part["kl"]), 100 * numeric(part["difference"])
            low, high = (100 * numeric(part[f"difference_{end}"]) for end in ("low", "high"))
            across = _TWO_SIDES * np.nan_to_num(numeric(part["kl_se"]))
            left = np.minimum(across, 0.999 * x) if logarithmic else across
            # The interval is not centred on the difference, and may end just short of it.
            ends = np.clip([y - low, high - y], 0, None)
            ax.errorbar(
                x, y, ends, [left, across], fmt="none", ecolor=styles[label]["color"], elinewidth=0.8, capsize=2
            )
            ax.plot(x, y, **styles[label], markersize=5)
        ax.axhline(0, color=BLACK, linewidth=0.8)
        if logarithmic:
            log_scale(ax, "x", kl)
        ax.set_title(task, fontsize=FONT)
        plain_axes(ax, "both")
    label_outer(axes[: len(tasks)], columns, "measured KL (nats per token)", "accuracy difference (points)")
    legend_below(figure, [key(label, **style) for label, style in styles.items()])
    headline(figure, title)
    return figure
