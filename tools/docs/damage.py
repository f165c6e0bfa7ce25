"""The damage of a model in each layout as a GPU serves it, beside that of the files and of the scheme, as Markdown.

The records are those of ``benchmarks/served_damage.py``; ``tools/docs/exports.py`` writes their tables into
``docs/processors.md``.
"""

from __future__ import annotations

import json
from pathlib import Path

from layerbits.plain import JsonMapping
from layerbits.serving.verdict import LEFT_BOUND

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
MARGIN = 0.1
"""How far the damage as served may be from that of the files, both rounded, where it is beyond the noise."""

_FIGURES = ("served_damage", "rounded_damage", "restored_damage", "scored_damage", "scored_damage_whole", "noise")
_HEADER = ("label", "kernel", "served", "both rounded", "restored", "scored", "probed", "noise", "served / rounded")


def tables() -> str:
    """A table of each record, the newest of each model."""
    return "\n".join(table(json.loads(file.read_text("utf-8"))) for file in sorted(RECORDS.glob("*-served-damage-*")))


def table(record: JsonMapping) -> str:
    """A row per layout that was compared, with the verdict, and the names of those that were only served."""
    rows = [row for row in record["layouts"] if "served_damage" in row]
    missing = [f"`{row['label']}`" for row in record["layouts"] if "served_damage" not in row]
    lines = [
        f"{record['model']}, {record['runtime']} on an {record['machine'].removeprefix('NVIDIA ')}, {record['date']}, "
        f"{rows[0]['tokens']:,} tokens:",
        "",
        f"| {' | '.join((*_HEADER, 'verdict'))} |",
        f"|{'---|' * (len(_HEADER) + 1)}",
        *map(_row, rows),
        "",
    ]
    return "\n".join([*lines, *([f"Served, not compared: {', '.join(missing)}.", ""] if missing else [])])


def agreement(row: JsonMapping) -> str:
    """How far the damage as served is from that of the files when PyTorch rounds as the runtime does."""
    served, rounded, noise = (row[key]["kl"] for key in ("served_damage", "rounded_damage", "noise"))
    off = f"{served / rounded - 1:+.1%}".replace("-", "−")
    if abs(served / rounded - 1) <= MARGIN:
        return off
    return f"{off}, within the noise" if abs(served - rounded) <= noise else f"**{off}**"


def verdict(row: JsonMapping) -> str:
    """What the serve check says of a layout."""
    left = row.get("from_weights", {}).get("kl")
    if left is not None and LEFT_BOUND * left < row["from_restored"]["kl"]:
        return "activations in 16 bits"
    return f"diverges (ratio {row['ratio']:.2f}, t {row['gain']['t']:.1f})" if row["diverges"] else "loads"


def _row(row: JsonMapping) -> str:
    kernels = ", ".join(f"{name.removesuffix('LinearKernel')}" for name in row["kernels"])
    figures = [f"{row[key]['kl']:.3g}" for key in _FIGURES]
    figures[0] += f" ({row['served_damage']['se']:.1g})"
    return f"| `{row['label']}` | {kernels} | {' | '.join(figures)} | {agreement(row)} | {verdict(row)} |"
