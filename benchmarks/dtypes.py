"""Are scores in bfloat16 those of float32? The same weights scored in both, by gradient and by fisher, six pairs.

    python benchmarks/dtypes.py --model smollm2 --out smollm2.json
    python benchmarks/dtypes.py --model FOLDER --name qwen2_5_coder_0_5b --out qwen.json
    python benchmarks/dtypes.py --shape qwen3-vl-4b --steps 4 --rows 4 --length 512 --out shape.json

Weights are those of the model in bfloat16 both times, widened for float32. ``fisher`` draws its labels from the model's
own predictions, so that some of them differ: a second float32 pass with another seed says how much draws alone move.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass import SIX, configs
from shapes import SHAPES, random_model, random_rows
from trust_table import planned, synchronize

from layerbits.inputs.models import LoadedModel
from layerbits.provenance import provenance
from layerbits.results.result import FloatArray
from layerbits.scoring import distributed, onepass
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.precision import Precision, computing
from layerbits.stages.run import load_model, scoring_job
from layerbits.trust.stability import kendall, overlap, spearman

ROOT = Path(__file__).resolve().parent.parent
WIDE = Precision("float32", True, False, 0.0, 0.0)


def job_of(arguments: argparse.Namespace, folder: Path) -> ScoringJob:
    """The pass over six pairs on a trained model or on a shape."""
    if arguments.shape is None:
        plan = planned(arguments)
        return replace(scoring_job(plan, load_model(plan), folder), draws=arguments.draws)
    loaded: LoadedModel = random_model(arguments.shape, distributed.device(arguments.device), torch.bfloat16)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    rows = random_rows(vocabulary, arguments.steps, arguments.rows, arguments.length)
    head = loaded.model.get_output_embeddings()
    names = tuple(n for n in loaded.linears if loaded.model.get_submodule(n) is not head)
    wanted = configs(tuple(arguments.pairs.split(",")), arguments.device)
    return ScoringJob(loaded, names, wanted, rows, "gradient", 12.0, folder, "dtypes", draws=arguments.draws)


def against(one: FloatArray, other: FloatArray) -> dict[str, float]:
    """How far two columns of scores ``[G]`` agree; ratios are of the first to the second."""
    known = np.isfinite(one) & np.isfinite(other) & (one > 0) & (other > 0)
    a, b = one[known], other[known]
    ratio = a / b
    return {
        "groups": int(known.sum()),
        "spearman": float(spearman(a[None], b[None])[0]),
        "kendall": float(kendall(a[None], b[None])[0]),
        "top10": float(overlap(a[None], b[None], 10)[0]),
        "median_ratio": float(np.median(ratio)),
        "lowest_ratio": float(ratio.min()),
        "highest_ratio": float(ratio.max()),
        "within_10_percent": float(((ratio > 0.9) & (ratio < 1.1)).mean()),
    }


def main() -> None:
    """Scores in both dtypes and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", default="smollm2_135m")
    parser.add_argument("--shape", choices=[*SHAPES])
    parser.add_argument("--pairs", default=",".join(SIX))
    parser.add_argument("--captions", default="262")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="batches of a shape")
    parser.add_argument("--rows", type=int, default=4, help="rows a batch of a shape")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further settings of the main job")
    arguments = parser.parse_args()
    arguments.dtype = "bfloat16"
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "provenance": provenance(ROOT),
        "seconds": {},
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(arguments, Path(folder) / "0")
        for method in ("gradient", "fisher"):
            seeds = {"bfloat16": job.seed, "float32": job.seed, "float32, other draws": job.seed + 1}
            found: dict[str, Scores] = {}
            for name, seed in seeds.items():
                if method == "gradient" and name == "float32, other draws":
                    continue
                mine = replace(job, method=method, seed=seed, workdir=Path(folder) / f"{method}-{name}")
                start = time.perf_counter()
                with computing(job.loaded.model, replace(WIDE, widened=name != "bfloat16")):
                    found[name] = onepass.score(mine)
                synchronize()
                record["seconds"][f"{method} {name}"] = time.perf_counter() - start
            rows = {}
            for c, pair in enumerate(job.configs):
                kl = {name: scores.predicted_kl[:, c] for name, scores in found.items()}
                rows[pair] = {"bfloat16": against(kl["bfloat16"], kl["float32"])}
                if len(kl) == 3:
                    rows[pair]["other draws"] = against(kl["float32, other draws"], kl["float32"])
                worst = np.argsort(-np.abs(np.log(kl["bfloat16"] / kl["float32"])))[:5]
                rows[pair]["worst"] = {
                    found["float32"].groups[g].key: float(kl["bfloat16"][g] / kl["float32"][g]) for g in worst
                }
                told = {k: v for k, v in rows[pair]["bfloat16"].items() if k != "groups"}
                print(method, pair, {k: round(v, 4) for k, v in told.items()}, flush=True)
            record["methods"][method] = rows
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print({k: round(v, 1) for k, v in record["seconds"].items()}, flush=True)


if __name__ == "__main__":
    main()
