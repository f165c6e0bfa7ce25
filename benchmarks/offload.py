"""``memory=offload`` under a limit of GPU memory against ``lean`` without one, in one process on one model.

    python benchmarks/offload.py --shape qwen3-32b --limit-gb 24 --out record.json
    python benchmarks/offload.py --shape qwen3-8b --limit-gb 12
    python benchmarks/offload.py --shape tiny --device cpu --steps 1 --rows 2 --length 64 --pairs wint8_afp16

The model is made on the GPU and scored there in ``lean``; then its blocks move to page-locked host memory, the process
is limited by ``torch.cuda.set_per_process_memory_fraction``, and it is scored again. One step of each goes before the
clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass import CONFIGS, SIX, configs
from shapes import SHAPES, random_model, random_rows

from layerbits.inputs.calibration import Calibration
from layerbits.inputs.offload import Offloaded, offload
from layerbits.provenance import provenance
from layerbits.scoring import kl, onepass
from layerbits.scoring.job import Scores, ScoringJob


class Bench:
    """A model and its rows, scored in several modes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cuda = arguments.device == "cuda"
        start = time.perf_counter()
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.loaded = random_model(arguments.shape, arguments.device, dtype, blocks=arguments.blocks)
        self.rows = random_rows(
            self.loaded.model.get_input_embeddings().num_embeddings,
            max(1, arguments.steps), arguments.rows, arguments.length,
        )  # fmt: skip
        head = self.loaded.model.get_output_embeddings()
        self.scored = tuple(n for n in self.loaded.linears if self.loaded.model.get_submodule(n) is not head)
        self.folder = Path(tempfile.mkdtemp(prefix="offload-"))
        self.passes = 0
        self.record: dict[str, Any] = {
            "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
            "provenance": provenance(CONFIGS.parent),
            "seconds_made": time.perf_counter() - start,
            "model_gb": sum(p.numel() * p.element_size() for p in self.loaded.model.parameters()) / 1e9,
        }

    def score(self, memory: str, steps: int) -> Scores:
        """A pass in a fresh folder."""
        self.passes += 1
        rows = Calibration(self.rows.calib[:steps], self.rows.score[:steps], 1, ())
        engine = kl if self.arguments.method == "kl_div" else onepass
        return engine.score(
            ScoringJob(
                self.loaded, self.scored, configs(tuple(self.arguments.pairs.split(",")), self.arguments.device), rows,
                self.arguments.method, 12.0, self.folder / str(self.passes), "benchmark", memory,
            )
        )  # fmt: skip

    def timed(self, name: str, memory: str) -> Scores:
        """Scores, and records seconds and peak GB."""
        self.score(memory, 1)
        best = None
        for _ in range(self.arguments.repeat):
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            scores = self.score(memory, self.arguments.steps)
            row = {"seconds": time.perf_counter() - start, **{f"seconds_{k}": v for k, v in scores.seconds.items()}}
            if self.cuda:
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
            row |= scores.memory
            best = row if best is None or row["seconds"] < best["seconds"] else best
            print(name, scores.mode, {k: round(v, 3) for k, v in row.items()}, flush=True)
        self.record[name] = best
        return scores

    def into_host_memory(self) -> Offloaded:
        """Moves the blocks out, and sets the limit."""
        start = time.perf_counter()
        streaming = offload(self.loaded.model, self.arguments.device)
        row = {
            "seconds": time.perf_counter() - start, "pinned": streaming.pinned,
            "block_gb": streaming.parts.block_bytes / 1e9, "streamed_gb": streaming.parts.total_bytes / 1e9,
        }  # fmt: skip
        if self.cuda:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(self.arguments.limit_gb * 1e9 / total)
            row["copy_gb_s"] = self._copy_speed(streaming)
        self.record["into_host_memory"] = row
        print("into_host_memory", row, flush=True)
        return streaming

    def _copy_speed(self, streaming: Offloaded) -> float:
        """GB/s of a copy of every block with nothing beside it."""
        with torch.no_grad():
            for turn in range(2):
                torch.cuda.synchronize()
                before, start = streaming.copied_bytes, time.perf_counter()
                for index in range(len(streaming.parts.blocks)):
                    streaming.fetch(index, visit=True)
                torch.cuda.synchronize()
                speed = (streaming.copied_bytes - before) / 1e9 / (time.perf_counter() - start)
                print(f"copy {turn}: {speed:.1f} GB/s", flush=True)
        return speed


def main() -> None:
    """Scores in both modes and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-32b")
    parser.add_argument("--blocks", type=int, help="only the first ones")
    parser.add_argument("--limit-gb", type=float, default=24.0)
    parser.add_argument("--pairs", default=",".join(SIX))
    parser.add_argument("--method", default="gradient", choices=("gradient", "fisher", "kl_div"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(f"model of {bench.record['model_gb']:.1f} GB made in {bench.record['seconds_made']:.0f} s", flush=True)
    lean = bench.timed("lean", "lean")
    streaming = bench.into_host_memory()
    before = streaming.copied_bytes
    streamed = bench.timed("offload", "offload")
    difference = np.abs(streamed.raw / lean.raw - 1)
    bench.record |= {
        "ratio": bench.record["offload"]["seconds"] / bench.record["lean"]["seconds"],
        "ratio_score": bench.record["offload"]["seconds_score"] / bench.record["lean"]["seconds_score"],
        "max_relative_difference": float(difference.max()),
        "copied_gb": (streaming.copied_bytes - before) / 1e9,
    }
    keys = ("ratio", "ratio_score", "max_relative_difference", "copied_gb")
    print({k: bench.record[k] for k in keys}, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(bench.record, indent=1) + "\n")


if __name__ == "__main__":
    main()
