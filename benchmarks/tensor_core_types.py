"""FP8 × FP8 and INT8 × INT8 products on the tensor cores' own types against the same in bf16: seconds, and scores.

    python benchmarks/tensor_core_types.py --out record.json

One block of Qwen3-VL-4B (random numbers, 4,096 tokens): weights and inputs of a candidate are E4M3 or INT8 with one
scale a tensor. The score of each way is held against that of bf16 and that of float32. Times are of products alone;
INT8 with and without the scaling of its sums to bf16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layerbits.provenance import provenance
from layerbits.scoring.reduction import token_scores

SHAPES = {"q": (2560, 4096), "k, v": (2560, 1024), "o": (4096, 2560), "gate, up": (2560, 9728), "down": (9728, 2560)}
COUNT = {"k, v": 2, "gate, up": 2}
REPEATS = 20


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, the best of three rounds."""
    run()
    best = float("inf")
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPEATS):
            run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / REPEATS)
    return best


def e4m3(x: Any) -> tuple[Any, Any]:
    """Numbers and scale."""
    scale = (x.abs().amax().float() / 448).reshape(())
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def int8(x: Any) -> tuple[Any, Any]:
    """Numbers and scale."""
    scale = (x.abs().amax().float() / 127).reshape(())
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def score(made: Any, gradient: Any, y: Any) -> float:
    """Raw score of an output."""
    return float(token_scores(gradient, made, y).double().sum())


def measured(features: int, outputs: int, tokens: int) -> dict[str, Any]:
    """Of one linear."""
    make = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, features, generator=make, device="cuda").bfloat16()
    weight = (torch.randn(outputs, features, generator=make, device="cuda") * 0.02).bfloat16()
    gradient = (torch.randn(tokens, outputs, generator=make, device="cuda") * 1e-4).bfloat16()
    y = torch.nn.functional.linear(x, weight)
    row: dict[str, Any] = {}

    def add(name: str, made: Any, exact: Any, plain: Any) -> None:
        found, reference, whole = (score(m, gradient, y) for m in (made, plain, exact))
        row[f"{name}_off_bf16"] = found / reference - 1
        row[f"{name}_off_float32"] = found / whole - 1
        row[f"{name}_bf16_off_float32"] = reference / whole - 1

    for kind, quantize in (("fp8", e4m3), ("int8", int8)):
        (xq, xs), (wq, ws) = quantize(x), quantize(weight)
        fake_x, fake_w = (xq.float() * xs).bfloat16(), (wq.float() * ws).bfloat16()
        plain = torch.nn.functional.linear(fake_x, fake_w)
        torch.backends.cuda.matmul.allow_tf32 = False
        exact = torch.nn.functional.linear(fake_x.float(), fake_w.float()).bfloat16()
        row[f"{kind}_bf16_seconds"] = seconds(lambda a=fake_x, b=fake_w: torch.nn.functional.linear(a, b))
        if kind == "fp8":
            for fast in (False, True):

                def product(fast: bool = fast, a: Any = xq, b: Any = wq, sa: Any = xs, sb: Any = ws) -> Any:
                    return torch._scaled_mm(a, b.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast)

                name = "fp8_fast_sums" if fast else "fp8"
                row[f"{name}_seconds"] = seconds(product)
                add(name, product(), exact, plain)
        else:
            both = xs * ws
            row["int8_product_seconds"] = seconds(lambda a=xq, b=wq: torch._int_mm(a, b.t()))

            def scaled(a: Any = xq, b: Any = wq, both: Any = both) -> Any:
                return (torch._int_mm(a, b.t()) * both).bfloat16()

            row["int8_seconds"] = seconds(scaled)
            add("int8", scaled(), exact, plain)
    return row


def main() -> None:
    """Measures the linears of a block and sums them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {name: measured(*shape, arguments.tokens) for name, shape in SHAPES.items()}
    total = {
        k: sum(row[k] * COUNT.get(name, 1) for name, row in rows.items()) for k in rows["q"] if k.endswith("_seconds")
    }
    for name, row in rows.items():
        print(name, {k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
    print("a block", {k: float(f"{v:.3g}") for k, v in total.items()}, flush=True)
    if arguments.out:
        record = {"provenance": provenance(Path(__file__).resolve().parent.parent), "linears": rows, "block": total}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
