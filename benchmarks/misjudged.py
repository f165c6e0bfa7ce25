"""Why a group is misjudged: is its error beyond second order, and which tokens carry it?

    python benchmarks/misjudged.py --model smollm2 --out smollm2.json
    python benchmarks/misjudged.py --model FOLDER --name qwen2_5_coder_0_5b --pairs wfp8_afp8 --out qwen.json

Each group alone, its quantization error scaled by 1, ½, ¼ and ⅛: to second order the KL divergence goes with the
square. Then the error at the first token of each row alone, and at all others: the first token is where attention sinks
lie, with activations far larger than elsewhere. Beside it the size of the hidden states there, block by block.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trust_table import held_out, planned

from layerbits.provenance import provenance
from layerbits.scoring import onepass
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.search import Search
from layerbits.scoring.suffix import SuffixRunner, find_blocks
from layerbits.stages.run import load_model, scoring_job
from layerbits.trust.validate import calibrated_linears

ROOT = Path(__file__).resolve().parent.parent
SCALES = (1.0, 0.5, 0.25, 0.125)
PARTS = ("all", "first", "others")


def partly(module: Any, quantized: Callable[..., Any], scale: float, part: str) -> Callable[..., Any]:
    """A linear with some of its quantization error."""
    own = module.forward

    def forward(x: Any) -> Any:
        y = own(x)
        error = (quantized(x) - y) * scale
        if part == "first":
            error[:, 1:] = 0
        elif part == "others":
            error[:, 0] = 0
        return y + error

    return forward


def largest(model: Any, blocks: Any, batch: Any) -> list[dict[str, float]]:
    """Per block the largest entry of what comes in, at the first token and elsewhere, and the median magnitude."""
    found: list[dict[str, float]] = []

    def see(_module: Any, args: Any, kwargs: Any) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().abs().float()
        sizes = hidden.amax(dim=-1)
        row = {"first": float(sizes[:, 0].max()), "others": float(sizes[:, 1:].max()), "median": float(hidden.median())}
        found.append(row)

    handles = [b.register_forward_pre_hook(see, with_kwargs=True) for b in blocks]
    try:
        with torch.inference_mode():
            model(input_ids=batch.segments[0].input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def main() -> None:
    """Scores by fisher and gradient, then measures the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", default="smollm2_135m")
    parser.add_argument("--pairs", default="wfp8_afp8,wint4_afp16,wint8_aint8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--captions", default="262")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", default="0,1,2,3,-2,-1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    plan = planned(arguments)
    loaded = load_model(plan)
    model = loaded.model
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "provenance": provenance(ROOT),
        "model": asdict(loaded.info),
        "groups": {},
    }
    with tempfile.TemporaryDirectory() as folder, fused_norms(model):
        job = scoring_job(plan, loaded, Path(folder) / "gradient")
        fisher = onepass.score(replace(job, method="fisher", workdir=Path(folder) / "fisher"))
        gradient = onepass.score(job)
        search = Search.of(job)
        linears = calibrated_linears(job, search)
        batches = held_out(arguments, plan.tokenizer)
        blocks = find_blocks(model, search.names, batches[0])
        record["hidden"] = largest(model, blocks.modules, batches[0])
        count = len(blocks.modules)
        wanted = {int(b) % count for b in arguments.blocks.split(",")}
        names = [
            (g, c) for g, group in enumerate(search.groups) if group.block in wanted for c in range(len(job.configs))
        ]
        variants = [(s, "all") for s in SCALES] + [(1.0, part) for part in PARTS[1:]]
        perturbations = [
            {
                name: partly(model.get_submodule(name), quantized, scale, part)
                for name, quantized in linears.quantized(search, g, c).items()
            }
            for g, c in names
            for scale, part in variants
        ]
        sums, tokens = np.zeros(len(perturbations)), 0
        for batch in batches:
            runner = SuffixRunner(model, blocks, batch)
            sums += np.array([runner.measure([p])[0].double().sum().item() for p in perturbations])
            tokens += batch.loss_tokens
    kl = (sums / tokens).reshape(len(names), len(variants))
    for (g, c), row in zip(names, kl, strict=True):
        pair = list(job.configs)[c]
        found = {f"{part} x {scale:g}": value for (scale, part), value in zip(variants, row.tolist(), strict=True)}
        found |= {"fisher": float(fisher.predicted_kl[g, c]), "gradient": float(gradient.predicted_kl[g, c])}
        found["beyond"] = row[0] / (row[3] / SCALES[3] ** 2)
        found["first_share"] = row[4] / row[0]
        record["groups"].setdefault(pair, {})[search.groups[g].key] = found
        ratio = row[0] / found["fisher"]
        print(
            f"{pair} {search.groups[g].key}: measured / fisher {ratio:.2f}, beyond second order {found['beyond']:.2f}, "
            f"first token's share {found['first_share']:.2f}",
            flush=True,
        )
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
