"""Seconds and peak memory against blocks, candidates and tokens; a fitted line; and what ``layerbits plan`` predicts.

    python benchmarks/cost.py --out cost.json --figure cost.png
    python benchmarks/cost.py --tiny --device cpu

Every point is a pass over random rows on a model of random weights (Qwen3-4B widths), three steps after one that warms
up. The forecast of a point comes from 2 and 4 blocks, as ``layerbits plan`` makes it, never from the point itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass import CONFIGS, TWELVE, configs
from scipy.optimize import nnls
from shapes import qwen3, tiny_llama

from layerbits.inputs.loading import empty_model
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import ResolvedModel, scored_linears
from layerbits.planning.sample import Work, estimate, measure
from layerbits.provenance import provenance
from layerbits.scoring.memory import choose, free_bytes
from layerbits.scoring.placement import needs_of
from layerbits.scoring.quantizers import distinct_settings

PAIRS = (*TWELVE, "wfp4_aint4", "wfp8_aint4", "wint8_aint4", "wint4_aint4")


def _card_work(point: dict[str, Any]) -> tuple[float, float, float]:
    work = float(point["weights"] * point["tokens"])
    return point["tokens"], work, work * point["candidates"]


def told(line: dict[str, float], point: dict[str, Any]) -> float:
    """Seconds of a step by a fitted line of :meth:`Bench.fits`."""
    head, step, candidate = _card_work(point)
    card = line["head"] * head + line["step"] * step + line["candidate"] * candidate
    return max(card, line["host"] * point["blocks"])


def least_squares(rows: Sequence[Sequence[float]]) -> list[float]:
    """Non-negative seconds per unit of the kinds of work in the first columns, by relative errors of the last."""
    found = np.array(rows, dtype=float)
    work, seconds = found[:, :-1], found[:, -1]
    scale = work.max(axis=0)
    fitted, _ = nnls(work / scale / seconds[:, None], np.ones_like(seconds))
    return [float(f"{value:.4g}") for value in fitted / scale]


def grid_model(blocks: int, tiny: bool = False) -> ResolvedModel:
    """A model of some blocks."""
    if tiny:
        config = tiny_llama()
        config.num_hidden_layers, dtype = blocks, "float32"
    else:
        config, dtype = qwen3(blocks, 2560, 9728, 32), "bfloat16"
    name = type(config).__name__.replace("Config", "ForCausalLM")
    config.architectures = [name]
    return ResolvedModel(ModelSpec("sample", "sample", dtype=dtype), "sample", "0", config, getattr(torch, dtype))


class Bench:
    """Points on one card."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.points: list[dict[str, Any]] = []

    def point(self, mode: str, blocks: int, candidates: int, rows: int, length: int) -> None:
        """Measures a point and forecasts it; a point that does not fit is left out."""
        resolved = grid_model(blocks, self.arguments.tiny)
        found = configs(PAIRS[:candidates], self.arguments.device)
        scored = tuple(n for n in scored_linears(empty_model(resolved), resolved.spec) if n != "lm_head")
        work = Work(resolved, scored, found, [(rows, length)], "gradient", 1, self.arguments.device)
        needs = needs_of(resolved, scored, rows * length, distinct_settings(list(found.values())))
        memory = choose(needs, free_bytes(torch.device(self.arguments.device)), mode)
        row = {"mode": mode, "blocks": blocks, "candidates": candidates, "tokens": rows * length}
        row |= {"weights": needs.weights.count, "formula_gb": memory.estimate_gb, "keep_weights": memory.keep_weights}
        if memory.estimate_gb * 1e9 > free_bytes(torch.device(self.arguments.device)):
            print("left out, does not fit:", row, flush=True)
            return
        real, told = measure(work, memory, blocks), estimate(work, memory)
        row |= {"seconds": real.seconds, "told_seconds": told.seconds, "calibrate_seconds": real.calibrate_seconds}
        row["seconds_off"] = told.seconds / real.seconds - 1
        if self.arguments.device == "cuda":  # a CPU has no peak of its own
            row |= {"gb": real.device_gb, "told_gb": told.device_gb, "gb_off": told.device_gb / real.device_gb - 1}
        self.points.append(row)
        self.write({})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def fits(self) -> dict[str, dict[str, float]]:
        """Per mode what a step takes of the card and of the host; the slower of the two is what it takes.

        The card: tokens × (head + weights × (step + candidates × candidate)), least squares of relative errors over the
        points of most tokens. The host, which launches kernels: blocks × host, the least of the points of fewer.
        """
        fitted = {}
        for mode in dict.fromkeys(p["mode"] for p in self.points):
            mine = [p for p in self.points if p["mode"] == mode]
            large = [p for p in mine if p["tokens"] >= self.base()["tokens"]]
            small = [p for p in mine if p not in large] or mine
            head, step, candidate = least_squares([(*_card_work(p), p["seconds"]) for p in large])
            line = {
                "head": head, "step": step, "candidate": candidate,
                "host": min(p["seconds"] / p["blocks"] for p in small),
                "calibrate": float(np.median([p["calibrate_seconds"] / p["weights"] / p["tokens"] for p in large])),
            }  # fmt: skip
            line["largest_off"] = max(abs(told(line, p) / p["seconds"] - 1) for p in mine)
            fitted[mode] = line
        return fitted

    def draw(self, path: Path, fitted: dict[str, Any]) -> None:
        """Seconds and peak against each of the three, one line a mode."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6.4), layout="constrained")
        figure.suptitle(
            "One pass against the size of the work (what is not varied: {blocks} blocks, {candidates} candidates, "
            "{tokens} tokens a step)".format(**self.base())
        )
        axes = figure.subplots(2, 3)
        base = self.base()
        for column, key in enumerate(("blocks", "candidates", "tokens")):
            others = [k for k in ("blocks", "candidates", "tokens") if k != key]
            for mode, line in fitted.items():
                mine = [p for p in self.points if p["mode"] == mode and all(p[k] == base[k] for k in others)]
                mine.sort(key=lambda p: p[key])
                at = [p[key] for p in mine]
                (drawn,) = axes[0, column].plot(at, [told(line, p) for p in mine], label=f"{mode}: fitted")
                axes[0, column].plot(
                    at, [p["seconds"] for p in mine], "o", color=drawn.get_color(), label=f"{mode}: measured"
                )
                if self.arguments.device == "cuda":
                    axes[1, column].plot(at, [p["told_gb"] for p in mine], "-", color=drawn.get_color())
                    axes[1, column].plot(at, [p["gb"] for p in mine], "o", color=drawn.get_color())
            axes[0, column].set(ylabel="seconds a step")
            axes[1, column].set(xlabel=key, ylabel="peak GB (line: what plan predicts)")
            for ax in axes[:, column]:
                ax.set(xlim=(0, None), ylim=(0, None))
                ax.grid(alpha=0.3)
        axes[0, 0].legend()
        figure.savefig(path, dpi=120)

    def write(self, fitted: dict[str, Any]) -> None:
        """Writes the record of what there is so far."""
        if self.arguments.out:
            worst = {k: max(abs(p[k]) for p in self.points) for k in self.measured()}
            record = {"provenance": provenance(CONFIGS.parent), "points": self.points, "fits": fitted, "worst": worst}
            self.arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    def measured(self) -> tuple[str, ...]:
        """What a forecast is held against; a CPU has no peak of its own."""
        return ("seconds_off", "gb_off") if self.arguments.device == "cuda" else ("seconds_off",)

    def base(self) -> dict[str, int]:
        """The point that the others differ from in one thing."""
        return {"blocks": 16 if not self.arguments.tiny else 5, "candidates": 4, "tokens": 8 * self.length()}

    def length(self) -> int:
        """Tokens of a row."""
        return 16 if self.arguments.tiny else 512


def main() -> None:
    """Measures, fits, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default="fast,lean")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    base, length = bench.base(), bench.length()
    blocks, many, rows = (8, 16, 32, 64), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)
    if arguments.tiny:
        blocks, many, rows = (5, 6), (1, 2), (1, 2)
    for mode in arguments.modes.split(","):
        shapes = [(b, base["candidates"], 8) for b in blocks]
        shapes += [(base["blocks"], c, 8) for c in many] + [(base["blocks"], base["candidates"], r) for r in rows]
        for b, c, r in dict.fromkeys(shapes):
            bench.point(mode, b, c, r, length)
    fitted = bench.fits()
    print(json.dumps(fitted, indent=1))
    print("the forecast is off by at most", {k: max(abs(p[k]) for p in bench.points) for k in bench.measured()})
    bench.write(fitted)
    if arguments.figure:
        bench.draw(arguments.figure, fitted)


if __name__ == "__main__":
    main()
