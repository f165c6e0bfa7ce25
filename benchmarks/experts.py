"""One pass over a mixture of experts against stock ``mtq.auto_quantize``: seconds, peak memory, floor, equality.

    python benchmarks/experts.py --shape qwen3-30b-a3b --parts floor,one,stock --out record.json
    python benchmarks/experts.py --limit-gb 84 --parts floor,one
    torchrun --nproc_per_node 2 benchmarks/experts.py --shape qwen3-30b-a3b-12 --parts one
    python benchmarks/experts.py --shape qwen3-30b-a3b-12 --parts order
    python benchmarks/experts.py --tiny

All parts run in one process on one model of random weights; kernels are built and warmed before the clock starts.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_pass import BUDGETS, SIX, configs
from passes import Passes
from shapes import SHAPES, random_model, random_rows
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from layerbits.inputs.experts import named_experts
from layerbits.scoring import distributed, onepass, quantizers, stock
from layerbits.scoring.experts import ExpertsTap
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.taps import make_tap

REPEATS = 5


class Bench(Passes):
    """One model and its rows; each part adds a row to the record."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if arguments.limit_gb:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.limit_gb * 1e9 / total)
        dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
        loaded = random_model(arguments.shape, distributed.device(arguments.device), dtype)
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        rows = random_rows(vocabulary, arguments.steps, arguments.rows, arguments.length)
        super().__init__(arguments, loaded, rows, "experts")
        self.model, self.memory = loaded.model, arguments.memory

    def of(self, pairs: tuple[str, ...], steps: int | None = None) -> ScoringJob:
        """A job of quant pairs."""
        return self.job(configs(pairs, self.device), self.memory, steps)

    def floor(self) -> None:
        """What the model alone takes: forward, forward + backward, the products of one candidate."""
        tokens = self.rows.score[0].segments[0].input_ids.numel()
        unquantized = quantizers.UNQUANTIZED
        taps = [make_tap(name, self.model.get_submodule(name), unquantized) for name in self.scored]

        def lighter_backward() -> None:
            with ExitStack() as stack:
                for tap in taps:
                    stack.enter_context(tap.lighter())
                self.backward()

        inputs: dict[Any, Any] = {}

        def entering(tap: Any) -> tuple[Any, ...]:
            """Random hidden states and a routing of random, distinct experts."""
            if isinstance(tap, ExpertsTap):
                width, count, k = tap.experts.shapes[0][1], tap.experts.count, tap._per_token()
                if (width, count, k) not in inputs:
                    index = torch.rand(tokens, count, device=self.device).topk(k, dim=1).indices
                    weights = torch.full((tokens, k), 1 / k, device=self.device, dtype=self.model.dtype)
                    inputs[width, count, k] = (self._randn(tokens, width), index, weights)
                return inputs[width, count, k]
            width = tap.module.in_features
            return inputs.setdefault(width, (self._randn(tokens, width),))

        def products() -> None:
            with torch.no_grad():
                for tap in taps:
                    if isinstance(tap, ExpertsTap):
                        ALL_EXPERTS_FUNCTIONS["grouped_mm"](tap.module, *entering(tap))
                    else:
                        torch.nn.functional.linear(*entering(tap), tap.module.weight)

        for name, part in {
            "floor_forward": self.forward,
            "floor_checkpointed": self.checkpointed_backward,
            "floor_lighter": lighter_backward,
            "floor_products": products,
        }.items():
            part()
            self.timed(name, part, REPEATS)
        row = self.record
        backward_seconds = min(row["floor_checkpointed"]["seconds"], row["floor_lighter"]["seconds"])
        step = backward_seconds + len(SIX) * row["floor_products"]["seconds"]
        row["floor"] = {"scoring_seconds": step * len(self.rows.score)}
        print("floor", row["floor"], flush=True)

    def _randn(self, *shape: int) -> Any:
        return torch.randn(*shape, device=self.device, dtype=self.model.dtype)

    def order(self) -> None:
        """How far stock's own scores move when the experts are summed in another order, beside one pass."""
        name = SIX[0]
        first = stock.score(self.of((name,))).raw[:, 0]
        one = onepass.score(self.of((name,))).raw[:, 0]
        self.reverse_experts()
        second = stock.score(self.of((name,))).raw[:, 0]
        self.reverse_experts()
        self.record["order"] = {
            "stock_reversed": float(np.abs(second / first - 1).max()),
            "one_pass": float(np.abs(one / first - 1).max()),
        }
        print("order", self.record["order"], flush=True)

    def reverse_experts(self) -> None:
        """Gives the experts the numbers the other way round: the same model, its experts summed in another order."""
        for name, experts in named_experts(self.model).items():
            gate = self.model.get_submodule(name.rpartition(".")[0]).gate
            tensors = [gate.weight, *(getattr(self.model.get_submodule(name), p) for p in experts.projections)]
            for tensor in tensors:
                tensor.data.copy_(tensor.data.flip(0))

    def compare(self, one: Scores, reference: Scores, name: str) -> None:
        """Largest relative difference of raw scores of one candidate, and whether the recipes agree."""
        import modelopt.torch.quantization as mtq

        column = list(one.states).index(name)
        relative = np.abs(one.raw[:, column] / reference.raw[:, 0] - 1)
        same = 0
        for bits in BUDGETS:
            made = [mtq.get_auto_quantize_config(s.states[name], {"effective_bits": bits}) for s in (one, reference)]
            same += str(made[0]["quant_cfg"]) == str(made[1]["quant_cfg"])
        self.record["equality"] = {
            "max_relative": float(relative.max()),
            "median_relative": float(np.median(relative)),
            "same_recipes": f"{same}/{len(BUDGETS)}",
        }
        print("equality", name, self.record["equality"], flush=True)


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-30b-a3b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--limit-gb", type=float, help="memory of a smaller card")
    parser.add_argument("--parts", default="floor,one,stock", help="of floor, one, stock, order, profile")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.device, arguments.rows, arguments.length = "tiny-experts", "cpu", 2, 64
    parts = arguments.parts.split(",")
    bench = Bench(arguments)
    bench.timed("warm_up", lambda: onepass.score(bench.of(SIX, steps=distributed.world())))  # in every process
    if "floor" in parts:
        bench.floor()
    one = bench.timed("one_six", lambda: onepass.score(bench.of(SIX))) if "one" in parts else None
    if one is not None:
        bench.record["sums"] = one.raw.sum(axis=0).tolist()  # to compare runs with different numbers of processes
        if "floor" in bench.record:
            ratio = bench.record["one_six"]["seconds_score"] / bench.record["floor"]["scoring_seconds"]
            bench.record["one_six"]["score_over_floor"] = ratio
            print("score over floor", round(ratio, 2), flush=True)
    if "profile" in parts:
        bench.profile(lambda: onepass.score(bench.of(SIX, steps=1)))
    if "stock" in parts:
        reference = bench.timed("stock_one_pair", lambda: stock.score(bench.of(SIX[:1])))
        if one is not None:
            bench.record["stock_over_one"] = (
                bench.record["stock_one_pair"]["seconds"] / bench.record["one_six"]["seconds"]
            )
            print("one stock pair over six pairs of one pass", round(bench.record["stock_over_one"], 1), flush=True)
            bench.compare(one, reference, SIX[0])
    if "order" in parts:
        bench.order()
    bench.write(arguments.out)


if __name__ == "__main__":
    main()
