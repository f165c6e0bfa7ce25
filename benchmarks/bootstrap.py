"""Intervals from captions drawn again: seconds and memory, and how often they cover the truth.

    python benchmarks/bootstrap.py --out record.json
    python benchmarks/bootstrap.py --results outputs/tmp/RUN outputs/tmp/RUN2 --out record.json

Without results only the time is measured, on synthetic shares. Each result given (512 captions or so) is a population
of captions: samples of it are drawn with replacement, so that the truth, the population's own predicted KL and ranking,
is known.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from layerbits.results.bootstrap import RESAMPLES, TOP, intervals
from layerbits.results.manifest import load_manifest

SAMPLES, GROUPS = 512, 144
SIZES = (8, 16, 32, 64, 128, 256)


def timing(turns: int) -> dict[str, Any]:
    """Seconds for 2,000 resamples over 512 captions × 144 groups, and peak memory."""
    rng = np.random.default_rng(0)
    means = rng.lognormal(-7, 1.5, GROUPS)
    shares = rng.gamma(1.5, 1 / 1.5, size=(SAMPLES, GROUPS)) * means / SAMPLES
    tokens = rng.integers(5, 20, SAMPLES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        intervals(shares, tokens)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"resamples": RESAMPLES, "seconds": seconds, "peak_gb": peak, "peak_gb_before": before}


def coverage(path: Path, repetitions: int) -> dict[str, Any]:
    """How often the intervals of samples of a result's captions hold what all of its captions say."""
    result = load_manifest(path)
    if result.sample_kl is None or result.sample_tokens is None:
        raise SystemExit(f"{path} has no scores of single captions")
    tokens = result.sample_tokens
    shares, total = result.sample_kl, tokens.sum()
    truth = shares.sum(axis=0)
    rank = (-truth).argsort().argsort() + 1
    rng = np.random.default_rng(0)
    rows = {}
    for size in SIZES:
        inside, ranks, width, stable, needed = [], [], [], [], []
        for _ in range(repetitions):
            drawn = rng.integers(0, len(tokens), size)
            sample = shares[drawn] * total / tokens[drawn].sum()
            found = intervals(sample, tokens[drawn])
            if found is None:
                raise SystemExit(f"{size} captions of {path} have too few tokens")
            low, high = found.low, found.high
            inside.append(np.mean((low <= truth) & (truth <= high)))
            width.append(np.median((high - low) / truth))
            ranks.append(np.mean((found.rank_low <= rank) & (rank <= found.rank_high)))
            stable.append(found.top_overlap)
            needed.append(found.top_captions)
        rows[size] = {
            "covered": float(np.mean(inside)),
            "rank_covered": float(np.mean(ranks)),
            "relative_width": float(np.median(width)),
            "top_overlap_estimated": float(np.mean(stable)),
            "top_overlap_true": _overlap(shares, tokens, size, rng),
            "top_captions_estimated": [float(q) for q in np.quantile(needed, [0.1, 0.5, 0.9], method="nearest")],
        }
        print(result.run_name, size, rows[size], flush=True)
    return {"run": result.run_name, "captions": len(tokens), "by_captions": rows}


def _overlap(shares: np.ndarray, tokens: np.ndarray, size: int, rng: np.random.Generator, pairs: int = 1000) -> float:
    """How many of their top groups two samples of the captions have in common."""
    tops = []
    for _ in range(2):
        weights = rng.multinomial(size, np.full(len(tokens), 1 / len(tokens)), size=pairs).astype(float)
        values = (weights @ shares) / (weights @ tokens)[:, None]
        tops.append(np.argpartition(-values, TOP - 1, axis=1)[:, :TOP].tolist())
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(*tops, strict=True)]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="folders of results with many captions")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"platform": platform.platform(terse=True), "cores": os.cpu_count(), "numpy": np.__version__},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "time": timing(arguments.turns),
    }
    print(record["time"], flush=True)
    record["coverage"] = [coverage(path, arguments.repetitions) for path in arguments.results]
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
