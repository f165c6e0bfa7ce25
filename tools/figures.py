"""Writes the pictures of the README and the docs to ``docs/figures``, at most 60 KB each.

    python tools/figures.py                  from the newest runs in the store, and from recorded benchmarks
    python tools/figures.py cost serving     those alone

``make figures`` makes the runs first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from layerbits.figures.style import BLUE, VERMILLION, key, legend_below, save_png
from layerbits.tracking.store import open_store
from tools.docs.damage import RECORDS, verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
LARGEST = 60_000
"""Bytes of a picture."""


def from_run(kind: str, artifact: str, where: str, path: Path) -> None:
    """Copies a figure of the newest finished run.

    Args:
        kind: Words for the run, for the error.
        artifact: Path of the figure among the run's artifacts.
        where: MLflow filter that finds the run.
        path: The picture to write.
    """
    client = MlflowClient(open_store(None, ROOT))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments,
        f"attributes.status = 'FINISHED' and {where}",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not runs:
        sys.exit(f"tools/figures.py: the store has no {kind}; `make figures` makes one")
    path.write_bytes(Path(client.download_artifacts(runs[0].info.run_id, artifact)).read_bytes())


def cost(path: Path) -> None:
    """Draws what a pass took against what ``layerbits plan`` predicted, from the record of an H200."""
    record = json.loads((RESULTS / "2026-11-29-cost-h200.json").read_text())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for mode, color in (("fast", BLUE), ("lean", VERMILLION)):
        points = [point for point in record["points"] if point["mode"] == mode]
        seconds.plot([p["told_seconds"] for p in points], [p["seconds"] for p in points], "o", color=color)
        memory.plot([p["told_gb"] for p in points], [p["gb"] for p in points], "o", color=color)
    for axes, what in ((seconds, "seconds of a step"), (memory, "peak GPU memory (GB)")):
        axes.set(xscale="log", yscale="log", xlabel=f"predicted {what}", ylabel=f"measured {what}")
        _diagonal(axes)
    figure.suptitle("What plan predicts, against passes on an H200 (8 to 64 blocks, 1 to 16 candidates)")
    legend_below(
        figure,
        [key(f"memory={m}", color=c, marker="o", linestyle="") for m, c in (("fast", BLUE), ("lean", VERMILLION))],
    )
    save_png(figure, path)


def serving(path: Path) -> None:
    """Draws the damage that vLLM does as served against that of the restored checkpoint, good and corrupted ones."""
    checkpoints = json.loads((RESULTS / "2026-11-25-serving.json").read_text())["checkpoints"]
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    good = [c for c in checkpoints if c["corruption"] is None]
    bad = [c for c in checkpoints if c["corruption"] is not None]
    looks = (("as exported", good, BLUE, "o"), ("corrupted on purpose", bad, VERMILLION, "x"))
    for _, rows, color, marker in looks:
        axes.plot([c["restored_damage"] for c in rows], [c["served_damage"] for c in rows], marker, color=color)
    axes.set(xscale="log", yscale="log", title="Served as scored? SmolLM2-135M in vLLM, CPU with AMX")
    axes.set(xlabel="KL of the restored checkpoint in PyTorch (nats per token)", ylabel="KL as served (nats per token)")
    _diagonal(axes)
    legend_below(figure, [key(name, color=color, marker=marker, linestyle="") for name, _, color, marker in looks])
    save_png(figure, path)


def served(path: Path) -> None:
    """Draws the damage of two trained models in each layout as an H200 serves it against that of the files."""
    rows = [row for file in RECORDS.glob("*-served-damage-*") for row in json.loads(file.read_text())["layouts"]]
    rows = [row for row in rows if "served_damage" in row]
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    looks = {"loads": (BLUE, "o"), "diverges": ("black", "s"), "activations in 16 bits": (VERMILLION, "x")}
    for row in rows:
        color, marker = looks[verdict(row).split(" (")[0]]
        axes.plot(row["rounded_damage"]["kl"], row["served_damage"]["kl"], marker, color=color)
    axes.set(xscale="log", yscale="log", title="Two models in each layout in vLLM 0.26.0 on an H200")
    axes.set(xlabel="KL of the files, both rounded (nats per token)", ylabel="KL as served (nats per token)")
    _diagonal(axes)
    legend_below(figure, [key(name, color=c, marker=m, linestyle="") for name, (c, m) in looks.items()])
    save_png(figure, path)


def budgets(path: Path) -> None:
    """Draws the decode step of schemes by milliseconds and by bits against their predicted KL."""
    record = json.loads((RESULTS / "2026-11-30-budget-ms-qwen3-vl-4b-h200.json").read_text())
    rows = [row for row in record["rows"] if row["step"] == "decode:1"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    looks = {"effective_bits": ("kl", "ms", VERMILLION), "budget_ms": ("kl_by_budget", "ms_by_budget", BLUE)}
    for kl, ms, color in looks.values():
        axes.plot([row[ms] for row in rows], [row[kl] for row in rows], "o-", color=color, markersize=4)
    axes.set(yscale="log", title="Qwen3-VL-4B shape with random weights, costs of an H200")
    axes.set(xlabel="decode step of one request (ms)", ylabel="predicted KL (nats per token)")
    axes.grid(alpha=0.3)
    legend_below(figure, [key(name, color=color, marker="o") for name, (_, _, color) in looks.items()])
    save_png(figure, path)


def answers(path: Path) -> None:
    """Draws accuracy differences of two pairs on an H200 against the schemes' KL, a panel per model and task."""
    rows = json.loads((RESULTS / "2026-11-30-answers-h200.json").read_text())["rows"]
    panels = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    figure = Figure(figsize=(9, 5), layout="constrained")
    looks = {"wint4_afp16": (BLUE, "o"), "wfp8_afp8": (VERMILLION, "s")}
    for axes, (model, task) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for row in rows:
            if (row["model"], row["task"]) == (model, task):
                color, marker = looks[row["pair"]]
                low, value, high = (100 * row["difference"][end] for end in ("low", "value", "high"))
                axes.plot(row["kl"], value, marker, color=color, markersize=4)
                axes.vlines(row["kl"], low, high, color=color, linewidth=0.8)
        axes.set(xscale="log", title=f"{task}, {model}", xlabel="measured KL (nats per token)")
        axes.title.set_fontsize("small")
        axes.grid(alpha=0.3)
    figure.supylabel("accuracy difference (points), 95% intervals", fontsize="small")
    legend_below(figure, [key(name, color=c, marker=m, linestyle="") for name, (c, m) in looks.items()])
    save_png(figure, path)


def _diagonal(axes: Axes) -> None:
    """Draws the line of equal values behind the points."""
    low = max(axes.get_xlim()[0], axes.get_ylim()[0])
    high = min(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="#777777", linewidth=0.8, zorder=0)
    axes.grid(alpha=0.3)


def _of(kind: str) -> str:
    return f"tags.`layerbits.kind` = '{kind}'"


PICTURES: dict[str, Callable[[Path], None]] = {
    "heatmap": partial(
        from_run,
        "run of the default model at wfp8_afp8, medium",
        "figures/heatmap.png",
        "params.`eff.model` = 'smollm2_135m' and params.`eff.quant_pair` = 'wfp8_afp8'"
        " and params.`eff.dataset_size` = 'medium' and params.`eff.method` = 'gradient'",
    ),
    "pareto": partial(from_run, "scheme run", "figures/pareto.png", _of("schemes")),
    "probe": partial(from_run, "probe", "figures/probe.png", _of("probe")),
    "validation": partial(from_run, "validation", "figures/validation.png", _of("validate")),
    "cost": cost,
    "serving": serving,
    "served": served,
    "budgets": budgets,
    "answers": answers,
}
"""Each picture, and what writes it."""


def main() -> None:
    """Writes the pictures that are asked for, or all."""
    names = sys.argv[1:] or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"tools/figures.py: no picture is called {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    FIGURES.mkdir(exist_ok=True)
    for name in names:
        path = FIGURES / f"{name}.png"
        PICTURES[name](path)
        size = path.stat().st_size
        if size > LARGEST:
            sys.exit(f"tools/figures.py: {path} has {size:,} bytes, more than {LARGEST:,}")
        print(f"{path.relative_to(ROOT)}: {size:,} bytes")


if __name__ == "__main__":
    main()
