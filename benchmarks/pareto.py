"""Seconds of a Pareto curve: 50 budgets over the 144 groups of a Qwen3-VL-4B under 12 candidates, without torch.

    PYTHONPATH=src python benchmarks/pareto.py --out record.json

Groups have the weights of that model. Scores are drawn: log-normal over the groups (a spread of 1.5, as measured on
trained models), times a typical ratio between the twelve pairs, times a log-normal deviation of each group. The larger
that deviation, the less do the candidates agree on the ranking; with none of it all groups trade alike, and ties are
what makes an integer program slow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import scipy

from layerbits.schemes import solver

BUDGETS = 50
WEIGHTS = np.tile([15_728_640, 10_485_760, 49_807_360, 24_903_680], 36)
BITS = (8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 4.25, 4.25, 4.25, 4.125, 4.125, 4.125)
NAMED = {f"candidate {c}": bits for c, bits in enumerate(BITS)}
RATIOS = (1.0, 1.2, 0.9, 0.02, 0.03, 1.3, 20.0, 22.0, 18.0, 9.0, 9.5, 15.0)
DEVIATIONS = (0.0, 0.1, 0.3, 1.0)
SEEDS = 5
GOAL = 5.0


def problem(deviation: float, seed: int) -> np.ndarray:
    """Scores ``[144, 12]``."""
    rng = np.random.default_rng(seed)
    size = (len(WEIGHTS), len(BITS))
    return rng.lognormal(-9, 1.5, (size[0], 1)) * RATIOS * rng.lognormal(0, deviation, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON record to write")
    out = parser.parse_args().out
    budgets = np.linspace(min(BITS), 16, BUDGETS).tolist()
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "scipy": scipy.__version__,
        "size": {"budgets": BUDGETS, "groups": len(WEIGHTS), "candidates": len(BITS), "seeds": SEEDS},
        "curves": [],
    }
    print(f"{BUDGETS} budgets, {len(WEIGHTS)} groups, {len(BITS)} candidates, {SEEDS} seeds")
    print(f"{'deviation':>9s} {'best s':>7s} {'worst s':>7s} {'of one budget s':>15s}")
    for deviation in DEVIATIONS:
        seconds, slowest = [], 0.0
        for seed in range(SEEDS):
            scores = problem(deviation, seed)
            start = time.perf_counter()
            solver.pareto(scores, NAMED, WEIGHTS, budgets)
            seconds.append(time.perf_counter() - start)
            for budget in budgets:
                start = time.perf_counter()
                solver.pareto(scores, NAMED, WEIGHTS, [budget])
                slowest = max(slowest, time.perf_counter() - start)
        record["curves"].append({"deviation": deviation, "seconds": seconds, "slowest_budget": slowest})
        print(f"{deviation:9.1f} {min(seconds):7.2f} {max(seconds):7.2f} {slowest:15.2f}")
    worst = max(s for curve in record["curves"] for s in curve["seconds"])
    record |= {"worst_seconds": worst, "goal_seconds": GOAL, "torch_imported": "torch" in sys.modules}
    print(f"worst {worst:.2f} s (goal: under {GOAL:g} s); torch imported: {record['torch_imported']}")
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
