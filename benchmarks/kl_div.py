"""``kl_div`` from block to block against stock ``mtq.auto_quantize``: seconds, peak memory, equality of scores.

    python benchmarks/kl_div.py --out record.json
    python benchmarks/kl_div.py --shape default --device cpu --rows 8 --length 128 --blocks 3 --turns 2

All parts run in one process on one model; kernels are built and warmed before the clock starts. With ``--blocks`` only
that many blocks are scored, spread evenly, so that half of the model lies behind them on average.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass import Bench
from scipy.stats import kendalltau, spearmanr
from shapes import SHAPES

from layerbits.scoring import kl, stock
from layerbits.scoring.divergence import Reference
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.norms import fused_norms

TILES = 4


class KlBench(Bench):
    """The same model and rows for both engines."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        if arguments.blocks:
            count = 1 + max(int(n.split(".layers.")[1].split(".")[0]) for n in self.scored)
            wanted = {int((i + 0.5) * count / arguments.blocks) for i in range(arguments.blocks)}
            self.scored = tuple(n for n in self.scored if any(f".layers.{i}." in n for i in wanted))

    def kl_job(self, pair: str, steps: int | None = None) -> ScoringJob:
        """A job of one candidate."""
        return replace(self.of((pair,), steps=steps), method="kl_div", scored=self.scored)

    def floor(self) -> None:
        """What a batch takes: the body whole, with fused norms and in tiles, the logits, and their comparison."""
        model, segment = self.loaded.model, self.rows.score[0].segments[0]
        ids = segment.input_ids.to(self.device)
        tiled = segment.tiled(TILES).input_ids.to(self.device)
        head = model.get_output_embeddings()
        with torch.inference_mode():
            hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
            size = max(1, (1 << 27) // head.weight.shape[0])
            pieces = hidden.split(size)
            reference = Reference(head, hidden, ids.flatten())
            logits = head(hidden[:size])[None] * 1.001

            def fused() -> None:
                with fused_norms(model):
                    model.base_model(input_ids=ids)

            def tiles() -> None:
                with fused_norms(model):
                    model.base_model(input_ids=tiled)

            parts: dict[str, tuple[Any, float]] = {
                "floor_body": (lambda: model.base_model(input_ids=ids), 1),
                "floor_body_fused_norms": (fused, 1),
                "floor_body_tiles": (tiles, 1 / TILES),
                "floor_logits": (lambda: [head(p) for p in pieces], 1),
                "floor_divergence": (lambda: reference.compare(slice(0, size), logits), len(hidden) / logits.shape[1]),
            }
            for name, (part, scale) in parts.items():
                part()
                self.timed(name, lambda part=part: [part() for _ in range(3)])
                self.record[name]["per_batch"] = self.record[name]["seconds"] / 3 * scale

    def compare(self, ours: Scores, theirs: Scores) -> None:
        """How far the scores agree."""
        a, b = ours.raw[:, 0], theirs.raw[:, 0]
        tokens = sum(self.rows.batch_loss_tokens)
        top = [set(np.argsort(-values)[:10].tolist()) for values in (a, b)]
        self.record["equality"] = {
            "max_relative": float(np.abs(a / b - 1).max()),
            "median_relative": float(np.median(np.abs(a / b - 1))),
            "max_nats_per_token": float(np.abs(a - b).max() / tokens),
            "smallest_kl": float(b.min() / tokens),
            "largest_kl": float(b.max() / tokens),
            "spearman": float(spearmanr(a, b).statistic),
            "kendall": float(kendalltau(a, b).statistic),
            "top10_overlap": len(top[0] & top[1]),
            "same_chosen": ours.chosen == theirs.chosen,
        }
        print("equality", self.record["equality"], flush=True)


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "default"), default="qwen3-vl-4b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="score only so many blocks; 0 = all")
    parser.add_argument("--pair", default="wfp8_afp8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=1, help="both engines in turns, so many times")
    parser.add_argument("--parts", default="floor,suffix,stock")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    bench = KlBench(arguments)
    if arguments.device == "cuda":  # builds and warms every kernel
        warm = replace(bench.kl_job(arguments.pair, steps=1), scored=bench.scored[:7])
        for engine in (kl, stock):
            engine.score(replace(warm, workdir=warm.workdir / engine.__name__))
    if "floor" in parts:
        bench.floor()
    if "profile" in parts:
        bench.profile(lambda: kl.score(bench.kl_job(arguments.pair, steps=1)))
    found: dict[str, list[float]] = {"suffix": [], "stock": []}
    scores: dict[str, Scores] = {}
    for turn in range(arguments.turns):
        for name, engine in (("suffix", kl), ("stock", stock)):
            if name in parts:
                row = f"{name}_{turn}"
                scores[name] = bench.timed(row, lambda engine=engine: engine.score(bench.kl_job(arguments.pair)))
                found[name].append(bench.record[row]["seconds"])
    if all(found.values()):
        each = [a / b for a, b in zip(found["suffix"], found["stock"], strict=True)]
        bench.record["ratio"] = {"median": float(np.median(each)), "each": each}
        print("suffix / stock", bench.record["ratio"], flush=True)
        bench.compare(scores["suffix"], scores["stock"])
    bench.write(arguments.out)


if __name__ == "__main__":
    main()
