"""How the figures look: colours, scales, panels, legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from layerbits.atomic import atomic
from layerbits.figures.settings import with_own_settings
from layerbits.results.frames import Grid, left_out
from layerbits.results.result import FloatArray

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): apart for every colour vision; without its yellow, which
# vanishes on white paper.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#777777"
Line: TypeAlias = str | tuple[float, Sequence[float]]
"""How matplotlib names a line's dashes: a word, or an offset with lengths of dashes and gaps in points."""


class LineStyle(TypedDict):
    """What tells a line from others."""

    color: str
    marker: str
    linestyle: Line


_DASHES: dict[str, Line] = {"dash-dot-dot": (0, (4, 1, 1, 1, 1, 1)), "dots": (0, (1, 1)), "long": (0, (7, 2))}
_KIND_LOOKS = {
    "qkv": (BLUE, "o", "-"),
    "mla_q": ("#004C77", "<", "-"),
    "mla_kv": (SKY, ">", "--"),
    "linear_attn_in": ("#6A51A3", "p", "-"),
    "ssm_in": ("#54278F", "h", "-."),
    "conv": ("#8C8C8C", "*", _DASHES["dots"]),
    "linear_attn_out": ("#9A5B00", "p", "--"),
    "ssm_out": ("#7F3B08", "h", _DASHES["long"]),
    "o": (ORANGE, "s", "--"),
    "router": ("#A6761D", "X", _DASHES["dots"]),
    "gate_up": (GREEN, "^", "-."),
    "down": (VERMILLION, "D", _DASHES["dash-dot-dot"]),
    "experts": ("#00503A", "d", "-"),
    "shared_gate_up": ("#7FCDBB", "^", _DASHES["dots"]),
    "shared_down": ("#F4A582", "D", _DASHES["long"]),
    "lm_head": (PURPLE, "v", _DASHES["dots"]),
    "other": (BLACK, "P", _DASHES["long"]),
    "vision_qkv": ("#3B6FA0", "o", _DASHES["dots"]),
    "vision_out": ("#C28F2C", "s", _DASHES["long"]),
    "vision_fc1": ("#5FAE7B", "^", _DASHES["long"]),
    "vision_fc2": ("#C97B63", "D", "-"),
    "merger": ("#555555", "*", "-"),
}
KIND_STYLES: dict[str, LineStyle] = {
    kind: {"color": color, "marker": marker, "linestyle": line} for kind, (color, marker, line) in _KIND_LOOKS.items()
}
"""Colour, marker and line style per kind of linear; marker and line style alone tell them apart in grey print.

A kind of one model has a shade of what does the same in others: latent projections of ``qkv``, experts of ``gate_up``.
"""
HATCH = "////"
COLORMAP = "cividis"
LABELS = {
    "predicted_kl": "Predicted KL (nats per token)",
    "score": "Raw score (ModelOpt's definition)",
    "kl": "Measured KL (nats per token)",
    "bits": "Effective bits (weight storage bits per weight)",
    "gib": "Checkpoint and KV cache, GiB",
    "served_gib": "Weights in vLLM, GiB",
    "decode_ms": "Decode step in vLLM, ms",
    "ms": "Step in vLLM as predicted, ms",
}
FONT = 9

COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "D", "^", "s", "v", "P", "X")
_LINES: tuple[Line, ...] = ("-", "--", "-.", _DASHES["dash-dot-dot"], _DASHES["dots"], _DASHES["long"])
_DECADES_SHOWN = 8  # below the top, a colour scale ends: rounding noise near zero must not use up the colours
_ZERO = "$0$"
_DPI = 120


def line_style(index: int) -> LineStyle:
    """Colour, marker and line style of the ``index``-th line; colours repeat after 7, the combination after 42."""
    turn, at = divmod(index, len(COLORS))
    return {
        "color": COLORS[at],
        "marker": _MARKERS[(at + turn) % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
    }


def label_of(value: str, label: str | None = None) -> str:
    """Words for a column: those given, else the ones known for it, else its name."""
    return label or LABELS.get(value, value)


def spans(values: FloatArray, ratio: float = 10.0) -> bool:
    """Whether the positive part of the values spans more than ``ratio``, so that a log scale serves."""
    positive = values[np.isfinite(values) & (values > 0)]
    return bool(positive.size and positive.max() > ratio * positive.min())


def color_norm(values: FloatArray) -> Normalize:
    """Log colours where the values span decades, linear from zero otherwise."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(0.0, 1.0)
    top = float(positive.max())
    if not spans(values):
        return Normalize(0.0, top)
    return LogNorm(max(float(positive.min()), top * 10.0**-_DECADES_SHOWN), top, clip=True)


def log_scale(ax: Axes, which: str, values: FloatArray) -> None:
    """Log scale along ``x`` or ``y``: beyond two decades whole decades are labelled, else 1, 2 and 5 times each."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    wide = spans(values, 100.0)
    axis.set_major_locator(LogLocator(numticks=8) if wide else LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    if not wide:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1g}"))
    axis.set_minor_formatter(NullFormatter())


def plain_axes(ax: Axes, lines: Literal["x", "y", "both"]) -> None:
    """Small text, no box, light lines along ``x``, ``y`` or ``both``."""
    ax.tick_params(labelsize=FONT - 1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=lines, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` equal panels in rows of ``columns``; ``height`` (inch) is that of a row."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, 0.8 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def label_outer(axes: Sequence[Axes], columns: int, x: str, y: str) -> None:
    """Axis titles once: x below the lowest panel of each column, y left of each row."""
    for i, ax in enumerate(axes):
        if i + columns >= len(axes):
            ax.set_xlabel(x, fontsize=FONT)
        if i % columns == 0:
            ax.set_ylabel(y, fontsize=FONT)


def legend_below(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """One legend for the figure, below the panels, as many columns as its words leave room for."""
    if not handles:
        return
    widths = [len(str(h.get_label())) * 0.068 + 0.65 for h in handles]  # inch, about, at this font size
    columns = len(handles)
    # Columns are filled from the top, each as wide as its widest entry.
    while columns > 1 and sum(max(part) for part in _columns(widths, columns)) > figure.get_figwidth():
        columns -= 1
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=FONT - 1,
        frameon=False,
        handlelength=2.8,
    )


def headline(figure: Figure, title: str) -> None:
    """A title above the figure, wrapped where it is wider."""
    if title:
        lines = textwrap.fill(title, int(figure.get_figwidth() * 10.5))
        figure.suptitle(lines, fontsize=FONT + 1, fontweight="bold")


def key(label: str, **style: Any) -> Line2D:
    """A legend entry for a marker or line."""
    return Line2D([], [], **{"markersize": 5, **style}, label=label)


def draw_line(ax: Axes, cells: Grid, kind: str, style: LineStyle) -> None:
    """Values of one kind along the blocks; a cross at the bottom where there is none, a level for lm_head."""
    row = cells.kinds.index(kind)
    inside = [i for i, block in enumerate(cells.blocks) if block is not None and cells.present[row, i]]
    blocks = np.array([cells.blocks[i] for i in inside], dtype=float)
    values = cells.values[row, inside]
    ax.plot(blocks, np.where(values > 0, values, np.nan), linewidth=1.2, markersize=3.5, **style)
    bad = blocks[~np.isfinite(values)]
    foot = ax.get_xaxis_transform()
    ax.plot(bad, np.full(bad.size, 0.02), "x", color=style["color"], markersize=6, transform=foot)
    zero = blocks[values <= 0]
    ax.plot(zero, np.full(zero.size, 0.03), marker=_ZERO, linestyle="", color=style["color"], transform=foot)
    if None in cells.blocks and cells.present[row, -1] and cells.values[row, -1] > 0:
        ax.axhline(cells.values[row, -1], linewidth=1.4, color=style["color"], linestyle=style["linestyle"])


def finish_lines(axes: Sequence[Axes], grids: Sequence[Grid]) -> None:
    """One scale for all panels of :func:`draw_line`: log where the values span decades."""
    values = np.concatenate([g.values.ravel() for g in grids])
    positive = values[np.isfinite(values) & (values > 0)]
    blocks = [b for g in grids for b in g.blocks if b is not None]
    for ax in axes:
        if spans(values):
            log_scale(ax, "y", values)
            ax.set_ylim(positive.min() / 2, positive.max() * 2)
        else:
            ax.set_ylim(0, positive.max() * 1.08 if positive.size else 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        if blocks:
            ax.set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
        plain_axes(ax, "both")


def odd_keys(grids: Sequence[Grid]) -> list[Line2D]:
    """Legend entries for the marks that :func:`draw_line` sets where a line cannot go."""
    keys = []
    unusable = list(dict.fromkeys(layer for g in grids for layer in g.unusable))
    if unusable:
        beyond = list(dict.fromkeys(layer for g in grids for layer in g.beyond))
        keys.append(key(left_out(unusable, beyond), marker="x", linestyle="", color=GREY))
    if any((g.present & (g.values <= 0)).any() for g in grids):
        keys.append(key("zero or below", marker=_ZERO, linestyle="", color=GREY))
    return keys


def _columns(widths: Sequence[float], columns: int) -> list[Sequence[float]]:
    rows, extra = divmod(len(widths), columns)
    ends = np.cumsum([rows + (i < extra) for i in range(columns)])
    return [widths[end - rows - (i < extra) : end] for i, end in enumerate(ends)]


@with_own_settings
def save_png(figure: Figure, path: Path) -> Path:
    """Writes the figure with a palette of 256 colours, whole or not at all."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    with atomic(path) as file:
        with_palette(Image.fromarray(np.asarray(canvas.buffer_rgba()))).save(file, "png", optimize=True)
    return path


def with_palette(image: Image.Image) -> Image.Image:
    """The picture with 256 colours: as a PNG about a third of the size.

    Chosen to cover the colours that occur: Pillow's default goes by their areas, and lost the few brightest cells of
    a heatmap.
    """
    return image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
