"""Figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from layerbits.atomic import optional_part
from layerbits.figures.settings import with_own_settings
from layerbits.figures.style import (
    BLACK,
    COLORMAP,
    FONT,
    GREY,
    HATCH,
    KIND_STYLES,
    LABELS,
    color_norm,
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
    save_png,
    spans,
)
from layerbits.plain import JsonObject
from layerbits.results.frames import (
    Grid,
    by_candidate,
    descending,
    drawable,
    grids,
    groups_for_share,
    knows_choice,
    left_out,
    not_believable,
    numeric,
    tidy,
)
from layerbits.results.result import FloatArray, SensitivityResult
from layerbits.results.routing import FLOOR, Routing

_ZERO = "#dddddd"


@with_own_settings
def heatmap(frame: pd.DataFrame, value: str = "predicted_kl", *, label: str | None = None, title: str = "") -> Figure:
    """Block × kind of linear, a panel per candidate under one colour scale.

    Cells that the solver quantized carry a dot; what is not finite is hatched and named in the legend.

    Args:
        frame: Tidy frame of one run.
        value: Column to draw.
        label: Words for the value with its unit; by default from the column name.
        title: Above the figure.
    """
    drawn = grids(frame, value)
    norm = color_norm(np.concatenate([g.values.ravel() for g in drawn.values()]))
    heights = [len(g.kinds) for g in drawn.values()]
    figure = Figure(figsize=(10, 1.6 + 0.34 * sum(heights) + 0.42 * (len(drawn) - 1)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, (name, cells) in zip(axes, drawn.items(), strict=True):
        _draw_cells(ax, cells, norm)
        if len(drawn) > 1:
            ax.set_title(name, fontsize=FONT, loc="left")
    axes[-1].set_xlabel("Decoder block", fontsize=FONT)
    bar = figure.colorbar(ScalarMappable(norm, COLORMAP), ax=list(axes), fraction=0.03, pad=0.01)
    bar.set_label(label_of(value, label), fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    handles: list[Line2D | Patch] = []
    if any(g.chosen.any() for g in drawn.values()):
        dot = {"markerfacecolor": "white", "markeredgecolor": BLACK, "linestyle": ""}
        handles.append(key("quantized by the recipe", marker="o", **dot))
    if any((g.present & (g.values <= 0)).any() for g in drawn.values()):
        handles.append(Patch(facecolor=_ZERO, edgecolor=GREY, label="zero or below"))
    unusable = list(dict.fromkeys(layer for g in drawn.values() for layer in g.unusable))
    if unusable:
        beyond = list(dict.fromkeys(layer for g in drawn.values() for layer in g.beyond))
        label = left_out(unusable, beyond)
        handles.append(Patch(facecolor="white", edgecolor=BLACK, hatch=HATCH, label=label))
    legend_below(figure, handles)
    headline(figure, title)
    return figure


@with_own_settings
def by_layer(frame: pd.DataFrame, value: str = "predicted_kl", *, label: str | None = None, title: str = "") -> Figure:
    """Value along the blocks, a line per kind of linear, a panel per candidate (arguments: :func:`heatmap`)."""
    drawn = grids(frame, value)
    columns = min(len(drawn), 2)
    figure, axes = panels(len(drawn), columns, width=8 + 2 * (columns - 1), height=3.2 if columns == 1 else 2.4)
    for ax, (name, cells) in zip(axes, drawn.items(), strict=True):
        for kind in cells.kinds:
            draw_line(ax, cells, kind, KIND_STYLES[kind])
        if len(drawn) > 1:
            ax.set_title(name, fontsize=FONT, loc="left")
    finish_lines(axes, list(drawn.values()))
    label_outer(axes, columns, "Decoder block", label_of(value, label))
    kinds = dict.fromkeys(k for g in drawn.values() for k in g.kinds)
    legend_below(figure, [*(key(k, **KIND_STYLES[k]) for k in kinds), *odd_keys(list(drawn.values()))])
    headline(figure, title)
    return figure


@with_own_settings
def ranked_bars(
    frame: pd.DataFrame,
    value: str = "predicted_kl",
    top: int = 20,
    *,
    label: str | None = None,
    title: str = "",
) -> Figure:
    """The ``top`` most sensitive groups as bars, largest value first, a panel per candidate.

    The predicted KL has whiskers where the columns ``low`` and ``high`` hold an interval of it, and on the right the
    range of the rank where ``rank_low`` and ``rank_high`` have one. A group that the solver did not quantize is
    hatched. What is not finite is named below.

    Args:
        frame: Tidy frame of one run.
        value: Column to draw.
        top: Groups per panel.
        label: Words for the value with its unit; by default from the column name.
        title: Above the figure.
    """
    parts = by_candidate(frame, value)
    columns = min(len(parts), 3)
    shown = min(top, max(len(part) for part in parts.values()))
    figure, axes = panels(len(parts), columns, width=(7.5, 10, 12)[columns - 1], height=0.6 + 0.2 * shown)
    unusable: dict[str, None] = {}
    beyond: dict[str, None] = {}
    kinds: set[str] = set()
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        amounts = drawable(part, value)
        unusable.update(dict.fromkeys(part["layer"][~np.isfinite(amounts)]))
        beyond.update(dict.fromkeys(not_believable(part, value)))
        part = part.iloc[descending(amounts)[:top]]
        kinds |= set(part["kind"])
        _draw_bars(ax, part, value)
        if len(parts) > 1:
            ax.set_title(name, fontsize=FONT, loc="left")
    label_outer(axes, columns, label_of(value, label), "")
    handles: list[Line2D | Patch] = [
        Patch(facecolor=style["color"], label=kind) for kind, style in KIND_STYLES.items() if kind in kinds
    ]
    if knows_choice(frame):
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch=HATCH, label="not quantized by the recipe"))
    if any(ax.collections for ax in axes):
        handles.append(key("interval, from captions drawn again", color=BLACK, linewidth=1.1, marker="|"))
    if unusable:
        handles.append(key(left_out(list(unusable), list(beyond)), marker="x", linestyle="", color=GREY))
    legend_below(figure, handles)
    headline(figure, title)
    return figure


@with_own_settings
def cumulative_share(frame: pd.DataFrame, value: str = "score", share: float = 0.9, *, title: str = "") -> Figure:
    """How many groups make most of the damage: running share of the sum, largest first, a line per candidate.

    Args:
        frame: Tidy frame of one run.
        value: Column to sum; what is not finite is left out.
        share: The share whose number of groups is marked.
        title: Above the figure.
    """
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    for i, (name, part) in enumerate(by_candidate(frame, value).items()):
        amounts = drawable(part, value)
        needed = groups_for_share(amounts, share)
        if needed == 0:
            continue
        running = np.cumsum(np.maximum(amounts[descending(amounts)], 0.0))
        running = np.concatenate([[0.0], 100 * running / running[-1]])
        style = line_style(i)
        words = f"{name}: {needed} of {len(running) - 1} groups make {share:.0%}"
        ax.plot(running, **style, markevery=[needed], markersize=7, linewidth=1.6, label=words.removeprefix(": "))
    ax.axhline(share * 100, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 102)
    ax.set_xlim(left=0)
    ax.set_xlabel("Groups, most sensitive first", fontsize=FONT)
    ax.set_ylabel(f"Share of the summed {'raw score' if value == 'score' else value} (%)", fontsize=FONT)
    plain_axes(ax, "both")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=FONT - 1, loc="lower right")
    headline(figure, title)
    return figure


@with_own_settings
def tokens_per_expert(routing: Sequence[Routing], *, title: str = "") -> Figure:
    """Tokens of each expert over the blocks, the busiest expert of a block at the top, a panel per phase.

    Experts without a token are grey; a line lies below the last expert of a block that saw :data:`FLOOR` tokens.

    Args:
        routing: Expert modules in model order.
        title: Above the figure.
    """
    phases = [p for p in ("calibration", "scoring") if any(getattr(r, p) for r in routing)]
    figure = Figure(figsize=(10, 1.2 + 2.6 * len(phases)), layout="constrained")
    axes = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
    experts = max(len(r.scoring) for r in routing)
    drawn = []
    for phase in phases:
        counts = np.full((experts, len(routing)), np.nan)
        for i, module in enumerate(routing):
            ordered = sorted(getattr(module, phase), reverse=True)
            counts[: len(ordered), i] = ordered
        drawn.append(counts)
    largest = max(float(np.nanmax(counts)) for counts in drawn)
    norm = LogNorm(1, max(largest, 2))
    for ax, phase, counts in zip(axes, phases, drawn, strict=True):
        for shown, colors in ((counts > 0, COLORMAP), (counts == 0, ListedColormap([_ZERO]))):
            cells, scale = np.ma.masked_where(~shown, counts), norm if colors is COLORMAP else None
            ax.imshow(cells, norm=scale, cmap=colors, aspect="auto", interpolation="nearest")
        enough = (counts >= FLOOR).sum(axis=0) - 0.5
        ax.stairs(enough, np.arange(len(routing) + 1) - 0.5, color=BLACK, linewidth=1.4, baseline=None)
        ax.set_ylabel("Experts, busiest first", fontsize=FONT)
        ax.set_title(f"{phase}: tokens per expert", fontsize=FONT, loc="left")
        every = 1 if len(routing) <= 40 else 5
        ticks = range(0, len(routing), every)
        ax.set_xticks(ticks, ["–" if routing[i].block is None else str(routing[i].block) for i in ticks])
        ax.tick_params(labelsize=FONT - 1)
    axes[-1].set_xlabel("Decoder block", fontsize=FONT)
    bar = figure.colorbar(ScalarMappable(norm, COLORMAP), ax=list(axes), fraction=0.03, pad=0.01)
    bar.set_label("Tokens (log scale)", fontsize=FONT)
    handles: list[Line2D | Patch] = [key(f"{FLOOR} tokens: fewer below the line", color=BLACK, linewidth=1.4)]
    if any((counts == 0).any() for counts in drawn):
        handles.append(Patch(facecolor=_ZERO, edgecolor=GREY, label="no token"))
    legend_below(figure, handles)
    headline(figure, title)
    return figure


def modality_by_layer(result: SensitivityResult, *, title: str = "") -> Figure:
    """Predicted KL along the blocks, a line for image positions and one for words.

    Args:
        result: Of a run whose rows had pictures; what is not believable is left out.
        title: Above the figure.
    """
    assert result.modality is not None
    figure, (ax,) = panels(1, 1, width=8, height=3.2)
    column = np.where(result.beyond, np.nan, result.predicted_kl)
    by_block = sorted(result.modality.by_block(result.groups, column).items())
    values = np.array([parts for _, parts in by_block], dtype=float).reshape(-1, 2)
    styles = {"image positions": line_style(1), "words": line_style(0)}
    for style, line in zip(styles.values(), values.T, strict=True):
        ax.plot([b for b, _ in by_block], np.where(line > 0, line, np.nan), linewidth=1.4, markersize=3.5, **style)
    if spans(values.ravel()):
        log_scale(ax, "y", values.ravel())
    else:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    plain_axes(ax, "both")
    label_outer([ax], 1, "Decoder block", LABELS["predicted_kl"])
    legend_below(figure, [key(name, **style) for name, style in styles.items()])
    headline(figure, title)
    return figure


def save_figures(result: SensitivityResult, directory: Path) -> list[Path]:
    """Writes the figures of one run as PNG, each whole or not at all; one that cannot be drawn is left out.

    Args:
        result: What was measured; where no predicted KL is known (an imported result), raw scores are drawn.
        directory: Made where missing.

    Returns:
        Paths of ``heatmap.png``, ``by_layer.png``, ``ranked.png`` and ``cumulative.png``; with experts also
        ``routing.png``, with pictures ``modality.png``.
    """
    known = bool((np.isfinite(result.predicted_kl) & ~result.beyond).any())
    value = "predicted_kl" if known else "score"
    frame = tidy(result)
    measured = known and result.method == "kl_div"
    label = "KL on the calibration rows (nats per token)" if measured else LABELS[value]
    title = result.run_name
    drawn: dict[str, Callable[[], Figure]] = {
        "heatmap": lambda: heatmap(frame, value, label=label, title=title),
        "by_layer": lambda: by_layer(frame, value, label=label, title=title),
        "ranked": lambda: ranked_bars(frame, value, label=label, title=title),
        "cumulative": lambda: cumulative_share(frame, title=title),
    }
    if any(module.scoring for module in result.routing):
        drawn["routing"] = lambda: tokens_per_expert(result.routing, title=title)
    if result.modality is not None and np.isfinite(result.modality.share).any():
        drawn["modality"] = lambda: modality_by_layer(result, title=title)
    paths = []
    for name, draw in drawn.items():
        with optional_part(f"figures/{name}.png"):
            paths.append(save_png(draw(), directory / f"{name}.png"))
    return paths


def _draw_cells(ax: Axes, cells: Grid, norm: Normalize) -> None:
    height, width = cells.values.shape
    drawable = np.ma.masked_where(~(cells.values > 0), cells.values)
    ax.imshow(drawable, norm=norm, cmap=COLORMAP, aspect="auto", interpolation="nearest")
    for y, x in zip(*np.nonzero(cells.present & ~(cells.values > 0)), strict=True):
        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_ZERO, linewidth=0)
        if np.isnan(cells.values[y, x]):
            cell.set(facecolor="white", edgecolor=BLACK, hatch=HATCH)
        ax.add_patch(cell)
    y, x = np.nonzero(cells.chosen)
    ax.scatter(x, y, s=14 if width <= 48 else 6, facecolor="white", edgecolor=BLACK, linewidth=0.7)
    every = 1 if width <= 40 else 5
    ticks = [i for i, b in enumerate(cells.blocks) if b is None or i % every == 0]
    ax.set_xticks(ticks, ["–" if cells.blocks[i] is None else str(cells.blocks[i]) for i in ticks])
    ax.set_yticks(range(height), cells.kinds)
    ax.tick_params(labelsize=FONT - 1, length=0)
    # White lines between the cells.
    ax.vlines(np.arange(width - 1) + 0.5, -0.5, height - 0.5, color="white", linewidth=0.8)
    ax.hlines(np.arange(height - 1) + 0.5, -0.5, width - 0.5, color="white", linewidth=0.8)
    ax.spines[:].set_visible(False)


def _draw_bars(ax: Axes, part: pd.DataFrame, value: str) -> None:
    amounts = numeric(part[value])
    y = np.arange(len(part))
    bars = ax.barh(y, amounts, height=0.72, color=[KIND_STYLES[k]["color"] for k in part["kind"]])
    if knows_choice(part):
        for bar, chosen in zip(bars, part["chosen"], strict=True):
            if not chosen:
                bar.set(hatch=HATCH, edgecolor="white", linewidth=0)
    shown = amounts
    if value == "predicted_kl" and {"low", "high"} <= set(part.columns):
        low, high = numeric(part["low"]), numeric(part["high"])
        known = np.isfinite(low) & np.isfinite(high)
        ax.hlines(y[known], low[known], high[known], color=BLACK, linewidth=1.1)
        ax.plot(low[known], y[known], "|", high[known], y[known], "|", color=BLACK, markersize=6)
        shown = np.concatenate([amounts, high[known]])  # one far whisker must not flatten all bars
    if value == "predicted_kl" and {"rank_low", "rank_high"} <= set(part.columns):
        _write_ranks(ax, numeric(part["rank_low"]), numeric(part["rank_high"]))
    if not len(part):
        ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", va="center", fontsize=FONT)
    if spans(shown, 100.0):
        log_scale(ax, "x", shown)
        if shown is not amounts and (amounts > 0).any():
            ax.set_xlim(left=amounts[amounts > 0].min() / 4)
    ax.set_yticks(y, part["layer"])
    ax.set_ylim(len(part) - 0.4, -0.6)
    plain_axes(ax, "x")
    ax.tick_params(axis="y", length=0)


def _write_ranks(ax: Axes, low: FloatArray, high: FloatArray) -> None:
    """Ranges of the ranks, right of the bars."""
    right: JsonObject = {"transform": ax.get_yaxis_transform(), "fontsize": FONT - 2, "color": GREY, "va": "center"}
    for y in np.flatnonzero(np.isfinite(low)).tolist():
        words = f"{low[y]:.0f}" if low[y] == high[y] else f"{low[y]:.0f}–{high[y]:.0f}"
        ax.text(1.01, y, words, **right)
    if np.isfinite(low).any():
        ax.text(1.01, -0.9, "rank", **right)
