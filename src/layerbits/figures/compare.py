"""Figures that compare runs, pairs or metrics."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from layerbits.figures.settings import with_own_settings
from layerbits.figures.style import (
    BLACK,
    COLORMAP,
    FONT,
    GREY,
    HATCH,
    KIND_STYLES,
    LineStyle,
    draw_line,
    finish_lines,
    headline,
    key,
    label_of,
    label_outer,
    legend_below,
    line_style,
    log_scale,
    odd_keys,
    panels,
    plain_axes,
    spans,
)
from layerbits.results.frames import Grid, grids, numeric, one_candidate, spearman
from layerbits.results.result import FloatArray


@with_own_settings
def overlay(
    frames: Mapping[str, pd.DataFrame], value: str = "predicted_kl", *, label: str | None = None, title: str = ""
) -> Figure:
    """Value along the blocks, a panel per kind of linear, a line per frame, one scale.

    Args:
        frames: Label (pair or run) → tidy frame; one with several candidates gives a line for each.
        value: Column to draw.
        label: Words for the value with its unit; by default from the column name.
        title: Above the figure.

    Raises:
        ValueError: No frame is given.
    """
    drawn: dict[str, Grid] = {}
    for name, frame in frames.items():
        parts = grids(frame, value)
        drawn |= {name if len(parts) == 1 else f"{name} · {candidate}": cells for candidate, cells in parts.items()}
    if not drawn:
        raise ValueError("no frames to overlay; check the filter that made them")
    kinds = [k for k in KIND_STYLES if any(k in g.kinds for g in drawn.values())]
    columns = min(len(kinds), 2)
    figure, axes = panels(len(kinds), columns, width=10, height=2.6)
    for ax, kind in zip(axes, kinds, strict=True):
        for i, cells in enumerate(drawn.values()):
            if kind in cells.kinds:
                draw_line(ax, cells, kind, line_style(i))
        ax.set_title(kind, fontsize=FONT, loc="left", fontweight="bold")
    finish_lines(axes, list(drawn.values()))
    label_outer(axes, columns, "Decoder block", label_of(value, label))
    handles = [key(name, **line_style(i)) for i, name in enumerate(drawn)]
    legend_below(figure, [*handles, *odd_keys(list(drawn.values()))])
    headline(figure, title)
    return figure


_SERVED: dict[str, Any] = {
    "linestyle": "",
    "marker": "D",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
}


@with_own_settings
def pareto(
    frame: pd.DataFrame, value: str = "score", cost: str = "bits", *, label: str | None = None, title: str = ""
) -> Figure:
    """What a scheme costs against its damage, with the front that nothing beats in both.

    Args:
        frame: Columns ``cost``, ``label`` and ``value``. Rows that share a label are joined by a line (one pair at
            several budgets), unless some cost the same (repeats). Where there is a column ``served_kl`` and the
            damage is a KL too, diamonds show what a runtime was measured to serve.
        value: Column of the damage.
        cost: Column of the cost: ``bits``, or ``gib``, ``ms``, ``served_gib`` and ``decode_ms`` of
            :func:`layerbits.history.schemes`.
        label: Words for the damage with its unit; by default from the column name.
        title: Above the figure.

    Raises:
        ValueError: No row has a finite cost and a finite damage.
    """
    costs, damage = numeric(frame[cost]), numeric(frame[value])
    usable = np.isfinite(costs) & np.isfinite(damage)
    if not usable.any():
        raise ValueError(f"no row has both {cost} and {value}; check the filter that made the frame")
    logarithmic = spans(damage[usable])
    shown = usable & (damage > 0) if logarithmic else usable
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    names = frame["label"].astype(str).to_numpy()
    styles: dict[str, LineStyle] = {}
    for i, name in enumerate(dict.fromkeys(names[shown])):
        at = np.flatnonzero(shown & (names == name))
        at = at[np.argsort(costs[at])]
        joined = len(at) > 1 and len(np.unique(costs[at].round(3))) == len(at)
        styles[name] = line_style(i) | ({} if joined else {"linestyle": ""})
        ax.plot(costs[at], damage[at], **styles[name], linewidth=1.2, markersize=6)
    front = _front(costs[shown], damage[shown])
    ax.step(*front, where="post", color=GREY, linewidth=4, alpha=0.3, zorder=1)
    served = (
        numeric(frame["served_kl"]) if "served_kl" in frame and value.endswith("kl") else np.full(len(costs), np.nan)
    )
    measured = np.isfinite(costs) & (served > 0)
    if measured.any():
        ax.plot(costs[measured], served[measured], **_SERVED)
    if logarithmic:
        log_scale(ax, "y", np.concatenate([damage[shown], served[measured]]))
    else:
        ax.set_ylim(bottom=min(0.0, float(damage[shown].min())))
    ax.set_xlabel(label_of(cost), fontsize=FONT)
    ax.set_ylabel(label_of(value, label), fontsize=FONT)
    plain_axes(ax, "both")
    handles = [key(name, **style) for name, style in styles.items()]
    cheaper = "no fewer bits" if cost == "bits" else "nothing cheaper"
    handles.append(key(f"{cheaper}\nwith less damage", color=GREY, linewidth=4, alpha=0.3))
    if measured.any():
        handles.append(key("as served, measured\nin a runtime", **_SERVED))
    if left_out := int((~shown).sum()):
        handles.append(key(f"{left_out} not shown:\nnot finite, or\nzero on a log scale", linestyle=""))
    figure.legend(handles=handles, loc="outside right upper", fontsize=FONT - 1, frameon=False, handlelength=2.8)
    ax.set_title(textwrap.fill(title, 60), fontsize=FONT + 1, fontweight="bold")  # beside the legend, not over it
    return figure


@dataclass(frozen=True)
class _Side:
    """Where each layer stands on one side of a rank change: its slot from the top and the words beside it."""

    slots: Mapping[str, int]
    words: Mapping[str, str]


@with_own_settings
def rank_change(
    frame_a: pd.DataFrame,
    frame_b: pd.DataFrame,
    labels: tuple[str, str],
    top: int = 20,
    movers: int = 8,
    *,
    title: str = "",
) -> Figure:
    """How the ``top`` groups of either run rank in the other: a line per group from left to right.

    Groups beyond the top of one side stand below its line, in their order, with their rank. The ``movers``
    largest moves are strong.

    Args:
        frame_a: Tidy frame with ``rank``, one candidate.
        frame_b: The same of the other run.
        labels: Names of the two runs.
        top: Ranks looked at on each side.
        movers: How many lines to make strong.
        title: Above the figure.
    """
    ranks = [
        dict(zip(f["layer"].astype(str), f["rank"].astype(int), strict=True))
        for f in (one_candidate(frame_a, "rank"), one_candidate(frame_b, "rank"))
    ]
    kinds = {**dict(zip(frame_b["layer"], frame_b["kind"], strict=True))}
    kinds |= dict(zip(frame_a["layer"], frame_a["kind"], strict=True))
    drawn = {layer for side in ranks for layer, rank in side.items() if rank <= top}
    left, right = (_side(side, drawn, top) for side in ranks)
    figure = Figure(figsize=(7.5, 1.3 + 0.19 * (max([*left.slots.values(), *right.slots.values()]) + 1)))
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    beyond = max(len(side) for side in ranks) + 1
    moves = {n: abs(ranks[0].get(n, beyond) - ranks[1].get(n, beyond)) for n in sorted(drawn)}
    strong = {n for n in sorted(moves, key=lambda n: -moves[n])[:movers] if moves[n] > 0}
    for layer in moves:
        ends, bold = [left.slots[layer], right.slots[layer]], layer in strong
        style = KIND_STYLES[kinds[layer]]
        weight = "bold" if bold else "normal"
        line = style if bold else {**style, "color": "#b0b0b0", "linestyle": "-"}
        ax.plot([0, 1], ends, **line, linewidth=2.0 if bold else 0.9, markersize=0, zorder=3 if bold else 2)
        ax.plot([0, 1], ends, marker=style["marker"], color=style["color"], linestyle="", markersize=4.5, zorder=4)
        ax.text(-0.03, ends[0], left.words[layer], ha="right", va="center", fontsize=FONT - 1, fontweight=weight)
        ax.text(1.03, ends[1], right.words[layer], ha="left", va="center", fontsize=FONT - 1, fontweight=weight)
    lowest = max([*left.slots.values(), *right.slots.values()])
    if lowest > top:
        ax.plot([-0.2, 1.45], [top + 1, top + 1], color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        ax.text(-0.22, top + 1, f"beyond {top}", ha="right", va="center", fontsize=FONT - 1, fontstyle="italic")
    ax.set_ylim(lowest + 0.7, 0.3)
    ax.set_xlim(-0.45, 1.45)
    ax.set_xticks([0, 1], labels, fontsize=FONT, fontweight="bold")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    common = [layer for layer in ranks[0] if layer in ranks[1]]
    rho = spearman(*(np.array([side[layer] for layer in common], dtype=float) for side in ranks))
    both = sum(ranks[0].get(n, beyond) <= top and ranks[1].get(n, beyond) <= top for n in drawn)
    ax.set_xlabel(
        f"Rank (1 = most sensitive). {both} of {min(top, len(common))} in both tops; "
        f"Spearman {rho:.2f} over {len(common)} groups",
        fontsize=FONT,
    )
    legend_below(figure, [key(k, **style) for k, style in KIND_STYLES.items() if k in {kinds[n] for n in drawn}])
    headline(figure, title)
    return figure


@with_own_settings
def scatter_agreement(
    x: FloatArray,
    y: FloatArray,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    *,
    labels: tuple[str, str] = (label_of("predicted_kl"), label_of("kl")),
    worst: int = 5,
    title: str = "",
) -> Figure:
    """Predicted against measured damage on log axes, with the identity and the band within a factor of two.

    Args:
        x: ``[n]`` predicted values.
        y: ``[n]`` measured values, the same unit. Pairs that are not both finite and positive are counted, not drawn.
        names: ``[n]`` names, for the points that disagree most.
        kinds: ``[n]`` kinds of linear, for colours and markers.
        labels: Words for x and y with their units.
        worst: How many points to name.
        title: Above the figure.

    Raises:
        ValueError: No pair can be drawn.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    drawn = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if not drawn.any():
        raise ValueError("no pair of values is finite and positive; nothing to compare")
    figure = Figure(figsize=(6.2, 6.2), layout="constrained")
    ax = figure.subplots()
    ends = np.array([min(x[drawn].min(), y[drawn].min()) / 2, max(x[drawn].max(), y[drawn].max()) * 2])
    ax.fill_between(ends, ends / 2, ends * 2, color="#e8e8e8", zorder=0)
    ax.plot(ends, ends, color=GREY, linewidth=1)
    groups = np.array(kinds if kinds is not None else ["other"] * len(x))
    handles = []
    for kind, style in KIND_STYLES.items():
        at = drawn & (groups == kind)
        if at.any():
            look: LineStyle = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
            ax.plot(x[at], y[at], **look, markersize=5, markeredgecolor="white", markeredgewidth=0.4)
            handles += [key(kind, **look)] if kinds is not None else []
    log_scale(ax, "x", ends)
    log_scale(ax, "y", ends)
    ax.set_xlim(*ends)
    ax.set_ylim(*ends)
    ax.set_aspect("equal")
    ratio = np.abs(np.log(y[drawn] / x[drawn]))
    if names is not None:
        off = np.flatnonzero(drawn)[np.argsort(-ratio, kind="stable")][: min(worst, int((ratio > np.log(2)).sum()))]
        _name_points(figure, ax, x[off], y[off], [names[i] for i in off])
    facts = [
        f"{int(drawn.sum())} points, Spearman {spearman(x[drawn], y[drawn]):.2f}",
        f"within a factor of 2: {np.mean(ratio <= np.log(2)):.0%}",
        f"median y / x: {np.median(y[drawn] / x[drawn]):.2f}",
    ]
    if left_out := int((~drawn).sum()):
        facts.append(f"{left_out} left out: not finite or not positive")
    ax.text(0.03, 0.97, "\n".join(facts), transform=ax.transAxes, va="top", fontsize=FONT - 1)
    ax.set_xlabel(labels[0], fontsize=FONT)
    ax.set_ylabel(labels[1], fontsize=FONT)
    plain_axes(ax, "both")
    band = key("within a factor of 2", color="#e8e8e8", linewidth=8)
    legend_below(figure, [*handles, key("equal", color=GREY, linewidth=1), band])
    headline(figure, title)
    return figure


@with_own_settings
def rank_correlation(matrix: pd.DataFrame, *, title: str = "") -> Figure:
    """Spearman correlations between pairs (or runs) as an annotated heatmap.

    Args:
        matrix: Square, rows and columns named; NaN where two cannot be compared (hatched).
        title: Above the figure.
    """
    values = matrix.to_numpy(dtype=float)
    count = len(values)
    side = max(3.4, 0.62 * count + 2.2)
    figure = Figure(figsize=(side + 0.8, side), layout="compressed")
    ax = figure.subplots()
    # Correlations crowd near 1: the scale starts below the lowest, at a tenth.
    low = min(0.9, math.floor(float(np.nanmin(values, initial=1.0)) * 10) / 10)
    image = ax.imshow(np.ma.masked_invalid(values), cmap=COLORMAP, vmin=low, vmax=1.0)
    for i in range(count):
        for j in range(count):
            if np.isnan(values[i, j]):
                ax.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="white", edgecolor=GREY, hatch=HATCH, linewidth=0)
                )
                continue
            bright = (values[i, j] - low) / (1.0 - low) > 0.55
            color = BLACK if bright else "white"
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color, fontsize=FONT)
    ax.set_xticks(range(count), [str(c) for c in matrix.columns], rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(count), [str(i) for i in matrix.index])
    ax.tick_params(labelsize=FONT - 1, length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, fraction=0.045, pad=0.03)
    bar.set_label("Spearman rank correlation", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    headline(figure, title)
    return figure


def _front(bits: FloatArray, damage: FloatArray) -> tuple[list[float], list[float]]:
    """Points that no other beats in both, by ascending bits."""
    front: tuple[list[float], list[float]] = ([], [])
    for i in np.lexsort((damage, bits)):
        if not front[1] or damage[i] < front[1][-1]:
            front[0].append(float(bits[i]))
            front[1].append(float(damage[i]))
    return front


def _side(ranks: Mapping[str, int], drawn: set[str], top: int) -> _Side:
    slots: dict[str, int] = {}
    words: dict[str, str] = {}
    for layer, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if layer in drawn:
            slots[layer] = rank if rank <= top else max(top + 1, *slots.values()) + 1
            words[layer] = f"{rank}  {layer}"
    for layer in sorted(drawn - set(ranks)):
        slots[layer] = max([top + 1, *slots.values()]) + 1
        words[layer] = f"–  {layer}"
    return _Side(slots, words)


def _name_points(figure: Figure, ax: Axes, x: FloatArray, y: FloatArray, names: Sequence[str]) -> None:
    """Names beside their points, shifted up where one would lie on another (in screen space)."""
    figure.draw_without_rendering()
    placed: list[npt.NDArray[np.float64]] = []
    scale = figure.dpi / 72
    for at in np.argsort(y):
        spot = ax.transData.transform((x[at], y[at])) / scale
        place = spot + np.array([6, 3])
        while any(abs(place[1] - p[1]) < FONT + 1 and abs(place[0] - p[0]) < FONT * 0.62 * 14 for p in placed):
            place = place + np.array([0, FONT + 1])
        placed.append(place)
        ax.annotate(
            names[at],
            (x[at], y[at]),
            xytext=(place[0] - spot[0], place[1] - spot[1]),
            textcoords="offset points",
            fontsize=FONT - 1,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )
