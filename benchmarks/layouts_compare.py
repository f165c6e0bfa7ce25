"""What a runtime computed of each layout: as written, or with the activations left in 16 bits.

    python benchmarks/layouts.py prepare WORK
    python benchmarks/serving_runtime.py WORK WORK/source WORK/exports/*     # in vLLM's environment, on the GPU
    python benchmarks/layouts_compare.py WORK --out layouts.json

PyTorch computes the restored checkpoint twice, with the activation rounding of its label and without. A runtime whose
answers are more than ``LEFT_BOUND`` times nearer to the second left the activations in 16 bits. One that rounds them
elsewhere than PyTorch is about as far from both (0.8 to 1.6 on an H200, where 62 and 680 were found of those that
left them). The distances are in the record, in nats per token over all positions, beside the runtime's own noise.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.restore import restore
from layerbits.serving.server import last_error
from layerbits.serving.verdict import LEFT_BOUND

WRITTEN, LEFT = "as written", "activations left in 16 bits"


def main() -> None:
    """Compares every layout that was asked, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runtime", default="vllm 0.26.0")
    parser.add_argument("--machine", default="NVIDIA H200")
    arguments = parser.parse_args()
    work, told = arguments.work, arguments.work / "told"
    rows = json.loads((work / "rows.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(work / "source", dtype=torch.float32)
    unquantized, served_plain = logprobs(plain, rows), read(told / "source.npz", rows)
    layouts = []
    for folder in sorted(path for path in (work / "exports").iterdir() if (path / "config.json").exists()):
        format, _, label = folder.name.partition("--")
        row: dict[str, Any] = {"format": format, "label": label}
        if (error := told / f"{folder.name}.error").exists():
            row |= {"loads": False, "words": last_error(error)}
        elif (answer := told / f"{folder.name}.npz").exists():
            row |= {"loads": True, "kernels": kernels(told / f"{folder.name}.kernels.json")}
            row |= compared(folder, rows, read(answer, rows), unquantized, served_plain)
        else:
            row |= {"loads": None, "words": "not asked"}
        layouts.append(row)
        print({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    record = {
        "date": date.today().isoformat(),
        "runtime": arguments.runtime,
        "machine": arguments.machine,
        "model": "random Llama of two blocks",
    }
    record |= {"positions": sum(len(row) - 1 for row in rows), "noise": kl(unquantized, served_plain)}
    arguments.out.write_text(json.dumps({**record, "layouts": layouts}, indent=1) + "\n")


def compared(
    folder: Path, rows: list[list[int]], served: torch.Tensor, unquantized: torch.Tensor, served_plain: torch.Tensor
) -> dict[str, Any]:
    """Damages and distances of one checkpoint, nats per token, and what was computed."""
    checkpoint = open_checkpoint(folder)
    quantization = read_quantization(checkpoint)
    restored = logprobs(restore(checkpoint, quantization, "cpu").float(), rows)
    row = {"damage_restored": kl(unquantized, restored), "damage_served": kl(served_plain, served)}
    row["from_restored"] = kl(restored, served)
    if not quantization.rounds_activations:
        return {**row, "computed": WRITTEN}
    weights = logprobs(restore(checkpoint, quantization.weights_only, "cpu").float(), rows)
    row |= {"damage_weights": kl(unquantized, weights), "from_weights": kl(weights, served)}
    return {**row, "computed": LEFT if LEFT_BOUND * row["from_weights"] < row["from_restored"] else WRITTEN}


def kernels(file: Path) -> dict[str, int]:
    """How many linears have which kernel."""
    names = [kind for kind in json.loads(file.read_text()).values() if kind.endswith("Kernel")]
    return {name: names.count(name) for name in sorted(set(names))}


@torch.no_grad()
def logprobs(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """``[positions, vocabulary]`` log-probabilities of the next token."""
    parts = [model(input_ids=torch.tensor([row])).logits[0, :-1].float().log_softmax(-1) for row in rows]
    return torch.cat(parts).double()


def read(file: Path, rows: list[list[int]]) -> torch.Tensor:
    """``[positions, vocabulary]`` of what ``serving_runtime.py`` wrote; what was not told is NaN."""
    told = np.load(file)
    starts = np.cumsum([0, *(len(row) - 1 for row in rows)])
    dense = torch.full((int(starts[-1]), 1024), torch.nan, dtype=torch.float64)
    dense[starts[told["row"]] + told["position"], told["token"]] = torch.from_numpy(told["logprob"])
    return dense


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of ``q`` from ``p`` over the tokens that both tell, the others as one event."""
    both = p.isfinite() & q.isfinite()
    p, q = (torch.where(both, x.exp(), 0.0) for x in (p, q))
    inside = torch.where(both, p * (p / q).log(), 0.0).sum(-1)
    rest_p, rest_q = ((1 - x.sum(-1)).clamp_min(1e-9) for x in (p, q))
    return float((inside + rest_p * (rest_p / rest_q).log()).mean())


if __name__ == "__main__":
    main()
