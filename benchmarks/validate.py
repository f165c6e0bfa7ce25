"""Seconds to measure every group of a model alone (enable-one) on held-out rows, with the suffix recompute.

python benchmarks/validate.py --out record.json
python benchmarks/validate.py --shape tiny --device cpu --length 64
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from one_pass import Bench
from shapes import SHAPES

from layerbits.scoring.search import Search
from layerbits.trust.measure import measure_damage
from layerbits.trust.validate import calibrated_linears


def main() -> None:
    """Measures once to warm up and then in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "default"), default="qwen3-vl-4b")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", default="wfp8_afp8,wfp4_afp8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    record: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "device": bench.device}
    for pair in arguments.pairs.split(","):
        job = bench.job((pair,))
        search = Search.of(job)
        linears = calibrated_linears(job, search)
        seconds = []
        for _ in range(arguments.turns):
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            found = measure_damage(job.loaded.model, linears, search, job.calibration.score, disable_one=False)
            seconds.append(time.perf_counter() - start)
        record[pair] = {
            "groups": len(search.groups),
            "seconds": seconds,
            "noise_floor": float(found.floor.max()),
            "above_twice_the_floor": int((found.alone.mean > 2 * found.floor).sum()),
            "smallest_kl": float(found.alone.mean.min()),
            "together": found.together_mean,
        }
        if arguments.device == "cuda":
            record[pair]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(pair, record[pair], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
