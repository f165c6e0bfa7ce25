"""A ModelOpt recipe in one pass against ``mtq.auto_quantize`` with the same recipe: seconds, peak memory, scores.

    python benchmarks/recipe.py --shape qwen3-vl-4b --out record.json
    python benchmarks/recipe.py --shape tiny --steps 2 --rows 2 --length 64 --device cpu

One process, one model of random weights; both parts run in turn, ``--rounds`` times, one pass first. Kernels are built
and warmed on one step of each before the clock starts. Both answer the recipe: the formats that ModelOpt's solver
chooses on either's scores are compared.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, random_model, random_rows

from layerbits.candidates import backends
from layerbits.inputs.calibration import Calibration
from layerbits.inputs.models import LoadedModel
from layerbits.provenance import provenance
from layerbits.recipes.recipe import LoadedRecipe, load_recipe
from layerbits.recipes.solve import solve_like_modelopt, solve_recipe
from layerbits.recipes.space import RecipeSpace, lay_out
from layerbits.scoring import onepass
from layerbits.scoring.groups import recipe_hparams
from layerbits.scoring.job import ScoringJob
from layerbits.scoring.steps import calibration_forward, loss_backward
from layerbits.scoring.stock import _restored_after


class Bench:
    """One model, its rows and a recipe."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.memory = arguments.device, arguments.memory
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.loaded: LoadedModel = random_model(arguments.shape, self.device, dtype)
        vocabulary = self.loaded.model.get_input_embeddings().num_embeddings
        self.rows = random_rows(vocabulary, arguments.steps, arguments.rows, arguments.length)
        self.recipe: LoadedRecipe = load_recipe(arguments.recipe)
        self.space: RecipeSpace = lay_out(self.recipe, self.loaded.model, self.loaded.linears)
        self.folder = Path(tempfile.mkdtemp(prefix="recipe-"))
        self.passes = 0

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A configuration with the kernels that this device has."""
        if self.device == "cuda":
            return copy.deepcopy(config)
        backends.register_backends()
        return backends.with_reference_backend(config)

    def one_pass(self, rows: Calibration) -> np.ndarray:
        """Raw scores, ``[searched slots, C]``."""
        self.passes += 1
        names = [c.info.name for c in self.space.candidates]
        made = {c.info.name: self.config(c.search_config()) for c in self.space.candidates}
        job = ScoringJob(
            self.loaded,
            self.space.scored,
            made,
            rows,
            self.recipe.method,
            12.0,
            self.folder / str(self.passes),
            "benchmark",
            fixed={module: made[names[c]] for module, c in self.space.held.items()},
            fixed_kv_cache=self.recipe.held_kv,
            memory=self.memory,
        )
        found = onepass.score(job)
        row_of = {slot.modules: s for s, slot in enumerate(self.space.searched)}
        raw = np.empty((len(row_of), len(names)))
        for g, group in enumerate(found.groups):
            raw[row_of[group.modules]] = found.raw[g]
        return raw

    def stock(self, rows: Calibration) -> np.ndarray:
        """The same by ModelOpt's own search; the model is as it was afterwards."""
        import modelopt.torch.quantization as mtq

        arguments = self.recipe.stock_arguments()
        for formats in (arguments["quantization_formats"] or [], *(self._spaces(arguments))):
            formats[:] = [self.config(c) for c in formats]
        if "fixed_quantization_config" in arguments:
            arguments["fixed_quantization_config"] = self.config(arguments["fixed_quantization_config"])
        head = "lm_head" in self.space.scored
        raw = np.empty((len(self.space.searched), len(self.space.candidates)))
        with warnings.catch_warnings(), _restored_after(self.loaded.model):
            warnings.simplefilter("ignore")
            model, _state = mtq.auto_quantize(
                self.loaded.model,
                **arguments,
                data_loader=list(zip_longest(rows.calib, rows.score)),
                forward_step=lambda m, pair: calibration_forward(m, pair[0], need_logits=head),
                forward_backward_step=lambda m, pair: loss_backward(m, pair[1]),
                num_calib_steps=len(rows.calib),
                num_score_steps=len(rows.score),
            )
            row_of = {slot.name: s for s, slot in enumerate(self.space.searched)}
            costs = self.space.costs
            for name, hparam in recipe_hparams(model):
                for choice in hparam.choices:
                    if name in row_of and choice.num_bits < 16:
                        at = min(range(len(costs)), key=lambda c: abs(costs[c] - 16 * choice.compression))
                        raw[row_of[name], at] = hparam.get_score(choice)
        return raw

    def timed(self, run: Any, rows: Calibration) -> tuple[np.ndarray, dict[str, float]]:
        """Runs, and measures seconds and peak GB."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        raw = run(rows)
        if self.device == "cuda":
            torch.cuda.synchronize()
        measured = {"seconds": time.perf_counter() - start}
        if self.device == "cuda":
            measured["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return raw, measured

    def _spaces(self, arguments: dict[str, Any]) -> list[list[Any]]:
        return [space["quantization_formats"] for space in arguments.get("module_search_spaces", [])]


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-vl-4b")
    parser.add_argument("--recipe", default="general/auto_quantize/nvfp4_fp8_at_5p4bits")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=16, help="batches to calibrate on, and as many to score on")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", default="auto", help="mode of the one pass")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    warm = Calibration(bench.rows.calib[:1], bench.rows.score[:1], 1, ())
    bench.one_pass(warm)
    bench.stock(warm)
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "provenance": provenance(Path(__file__).resolve().parent.parent),
        "groups": len(bench.space.searched),
        "rounds": [],
    }
    for _ in range(arguments.rounds):
        mine, one = bench.timed(bench.one_pass, bench.rows)
        theirs, stock = bench.timed(bench.stock, bench.rows)
        both = solve_like_modelopt(bench.space, mine).assignment, solve_like_modelopt(bench.space, theirs).assignment
        row = {
            "one_pass": one,
            "stock": stock,
            "ratio": one["seconds"] / stock["seconds"],
            "largest_relative_difference": float((np.abs(mine - theirs) / np.abs(theirs)).max()),
            "different_choices": sum(a != b for a, b in zip(*both, strict=True)),
            "our_answer": solve_recipe(bench.space, mine).score,
            "modelopt_answer": solve_like_modelopt(bench.space, mine).score,
        }
        record["rounds"].append(row)
        print(json.dumps(row, indent=1), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
