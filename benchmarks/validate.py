"""Seconds to measure every group of a model alone (enable-one) on held-out rows, with the suffix recompute.

python benchmarks/validate.py --out record.json
python benchmarks/validate.py --shape tiny --device cpu --length 64
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from one_pass import Bench
from shapes import SHAPES

from layerbits.inputs.calibration import Batch, build_rows
from layerbits.inputs.captions import load_captions
from layerbits.scoring.divergence import divergence, log_partition
from layerbits.scoring.precision import computing, plan_precision
from layerbits.scoring.search import Search
from layerbits.scoring.steps import predictions
from layerbits.trust.measure import measure_damage
from layerbits.trust.validate import calibrated_linears


def full_forwards(bench: Bench, batches: tuple[Batch, ...]) -> float:
    """Seconds of a forward of the whole model with its logits, and of comparing them: what each group would take."""
    model, seconds = bench.loaded.model, []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            for batch in batches:
                logits, targets = (
                    torch.cat(x) for x in zip(*(predictions(model, s) for s in batch.segments), strict=True)
                )
                divergence(logits, log_partition(logits), logits[None], targets)
            if bench.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


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
    parser.add_argument("--dtype", default="model", help="what to measure in: auto, float32 or model")
    parser.add_argument("--by-block", action="store_true", help="widen block by block where it widens")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    record: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "device": bench.device}
    batches = bench.rows.score
    if arguments.shape == "default":  # its 16 calibration captions fill two rows
        captions = load_captions("everyday", "medium").held_out
        batches = build_rows(captions, bench.loaded.tokenizer, "packed", arguments.length, arguments.rows)[:1]
    full = full_forwards(bench, batches)
    for pair in arguments.pairs.split(","):
        job = bench.of((pair,))
        search = Search.of(job)
        linears = calibrated_linears(job, search)
        linears.fix_dtypes()
        tokens = max(s.input_ids.numel() for b in batches for s in b.segments)
        precision = plan_precision(job.loaded.model, tokens, arguments.dtype)
        if arguments.by_block and precision.widened:
            precision = replace(precision, by_block=True)
        seconds = []
        for _ in range(arguments.turns):
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with computing(job.loaded.model, precision):
                found = measure_damage(job.loaded.model, linears, search, batches, disable_one=False)
            seconds.append(time.perf_counter() - start)
        record[pair] = {
            "groups": len(search.groups),
            "rows": [len(x.input_ids) for b in batches for x in b.segments],
            "full_forwards": full * len(search.groups),
            "seconds": seconds,
            "measured_in": asdict(precision),
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
