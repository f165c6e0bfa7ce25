"""What a solver chooses when the captions are drawn again, a strip per block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from layerbits.figures.style import COLORS, FONT, headline, legend_below
from layerbits.results.result import KINDS, FloatArray

_NONE = "#d9d9d9"


def choice_strips(
    blocks: Sequence[int | None],
    kinds: Sequence[str],
    choices: Sequence[str | None],
    shares: FloatArray,
    chosen: Sequence[int],
    title: str = "",
) -> Figure:
    """Share of the draws that give each group each format: stacked in a cell per group, blocks from left to right.

    A cell of one colour is sure. A frame marks groups whose own choice is not that of most draws.

    Args:
        blocks: ``[G]`` block of each group; ``None`` (outside the blocks) is drawn last.
        kinds: ``[G]`` kind of each group.
        choices: ``[K]`` names of the formats, ``None`` = unquantized.
        shares: ``[G, K]``.
        chosen: ``[G]`` position of the scheme's own choice.
        title: Above the figure.
    """
    rows = [k for k in KINDS if k in kinds]
    known = sorted({b for b in blocks if b is not None})
    columns: dict[int | None, int] = {b: i for i, b in enumerate(known)}
    columns[None] = len(known)
    width = len(known) + (None in blocks)
    figure = Figure(figsize=(10, 1.5 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    colors = [_NONE if name is None else COLORS[i % len(COLORS)] for i, name in enumerate(choices)]
    seen: dict[tuple[int, int], int] = {}
    crowded: dict[tuple[int, int], int] = {}
    handles = [
        Patch(color=colors[i], label=choices[i] or "unquantized") for i in range(len(choices)) if shares[:, i].any()
    ]
    odd = [int(np.argmax(own)) != choice for own, choice in zip(shares, chosen, strict=True)]
    if any(odd):
        label = "most draws choose another than the scheme"
        handles.append(Patch(facecolor="none", edgecolor="black", linewidth=0.9, label=label))
    for block, kind in zip(blocks, kinds, strict=True):
        at = columns[block], rows.index(kind)
        crowded[at] = crowded.get(at, 0) + 1
    for group, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        at = columns[block], rows.index(kind)
        part = seen.get(at, 0)  # several groups of a kind in a block share its cell
        seen[at] = part + 1
        wide = 0.88 / crowded[at]
        left, bottom = at[0] - 0.44 + part * wide, at[1] - 0.4
        for share, color in zip(shares[group], colors, strict=True):
            ax.add_patch(Rectangle((left, bottom), wide, 0.8 * share, facecolor=color, edgecolor="none"))
            bottom += 0.8 * share
        if odd[group]:
            frame = Rectangle((left, at[1] - 0.4), wide, 0.8, facecolor="none", edgecolor="black", linewidth=0.9)
            ax.add_patch(frame)
    ax.set_xlim(-0.7, width - 0.3)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), rows, fontsize=FONT - 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.xaxis.set_major_formatter(lambda x, _: str(known[int(x)]) if 0 <= x < len(known) and x == int(x) else "")
    ax.set_xlabel("Decoder block", fontsize=FONT)
    ax.tick_params(labelsize=FONT - 1, length=0)
    ax.spines[:].set_visible(False)
    legend_below(figure, handles)
    headline(figure, title)
    return figure
