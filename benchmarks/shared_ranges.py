"""What it costs to give fused linears one range for their weights, and what a runtime's second rounding costs.

    python benchmarks/shared_ranges.py --out record.json
    python benchmarks/shared_ranges.py --candidates wfp8_afp8,wfp4_afp16//nvfp4 --rows 8 --out record.json

For each format on the default model, all linears quantized, three ways to get one scale for q, k, v and for gate, up:
``own`` a range for each linear (what was scored so far, and nothing that a runtime with one scale can compute),
``shared`` the largest range from the start (overlay ``w_shared``), ``twice`` weights rounded at their own range and
then again at the largest, which is what a runtime makes of a checkpoint with ``own``. Predicted KL by ``gradient`` for
the first two, measured KL on held-out rows for all three, both in nats per token. Standard errors are over the rows;
``from_own`` is the difference to ``own`` on the same rows, with the standard error of that difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from uniform import compose, prepared, scheme_of

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.fused import fused
from layerbits.candidates.granularity import Overlay
from layerbits.inputs.calibration import Batch
from layerbits.probing.apply import apply_scheme, configs_of, find_ranges
from layerbits.probing.probe import held_out_rows
from layerbits.scoring.assigned import calibrated
from layerbits.scoring.steps import predictions
from layerbits.stages.run import run
from layerbits.stages.workbench import Workbench, workbench

ROOT = Path(__file__).resolve().parent.parent
SHARED = Overlay.from_mapping({"name": "w_shared", "quant_cfg_overrides": {"*weight_quantizer": {"shared": True}}})


def log_probabilities(model: Any, rows: tuple[Batch, ...]) -> list[torch.Tensor]:
    """Per row ``[tokens, vocabulary]``."""
    found = []
    with torch.no_grad():
        for batch in rows:
            for segment in batch.segments:
                logits = predictions(model, segment)[0].double().log_softmax(-1)
                found += list(logits.reshape(len(segment.input_ids), -1, logits.shape[-1]))
    return found


def divergence(reference: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    """KL per token of each row."""
    rows = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(reference, other, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def mean(values: torch.Tensor) -> dict[str, float]:
    """Mean and standard error over rows."""
    return {"kl": float(values.mean()), "se": float(values.std() / len(values) ** 0.5)}


def measured(bench: Workbench, own: Candidate, shared: Candidate, rows: int, device: str) -> dict[str, Any]:
    """Measured KL of the three ways."""
    schemes = {name: scheme_of(bench, made, name) for name, made in (("own", own), ("shared", shared))}
    ready = prepared(bench, schemes["own"])
    spec = bench.settings.autoquant
    held_out = held_out_rows(
        bench.captions.held_out, bench.tokenizer, bench.settings.dataset.packing, spec.seq_len, min(rows, 4), rows
    )
    model = ready.load(device).model
    ranges = find_ranges(model, list(schemes.values()), ready.calibration)
    reference = log_probabilities(model, held_out)
    result = {}
    for name, scheme in schemes.items():
        with apply_scheme(model, scheme, ranges, keep_weights=False):
            result[name] = divergence(reference, log_probabilities(model, held_out))
    linears = {name: model.get_submodule(name) for name in schemes["own"].modules}
    together = {name: names for names in fused(linears) for name in names}
    # the ranges that a runtime finds in the checkpoint are those of the first rounding
    taps = calibrated(model, configs_of(model, schemes["own"]), ranges.inputs)
    scaled = {name: tap.weight_quantizers()[0] for name, tap in taps.items()}
    largest = {name: max(float(scaled[n].amax) for n in together[name]) for name in linears}
    with torch.no_grad():
        for name, module in linears.items():
            once = scaled[name](module.weight)
            scaled[name].amax = torch.full_like(scaled[name].amax, largest[name])
            module.weight.copy_(scaled[name](once) if len(together[name]) > 1 else module.weight)
    with apply_scheme(model, schemes["shared"], ranges, keep_weights=False):
        result["twice"] = divergence(reference, log_probabilities(model, held_out))
    return {name: {**mean(rows), "from_own": mean(rows - result["own"])} for name, rows in result.items()}


def main() -> None:
    """Scores and measures each candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", default="wfp8_afp8,wfp4_afp16//nvfp4", help="pair or pair//fp4, by commas")
    parser.add_argument("--rows", type=int, default=8, help="held-out rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overrides", default="", help="of the composed configuration, separated by spaces")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = {}
    for wanted in arguments.candidates.split(","):
        pair, _, fp4 = wanted.partition("//")
        settings = compose([f"quant_pair={pair}", *([f"fp4={fp4}"] if fp4 else []), *arguments.overrides.split()])
        with tempfile.TemporaryDirectory() as work:
            settings = replace(settings, device=arguments.device, output_root=Path(work))
            bench = workbench(settings)
            own, shared = (
                resolve_candidate(settings.quant_pair, overlay, settings.fp4) for overlay in (settings.overlay, SHARED)
            )
            outcomes = run(bench.plan([(made, bench.check(made)) for made in (own, shared)]), ROOT)
            predicted = {
                name: outcome.result.total() for name, outcome in zip(("own", "shared"), outcomes, strict=True)
            }
            found = measured(bench, own, shared, arguments.rows, arguments.device)
        record[wanted] = {"predicted": predicted, "measured": found}
        print(wanted, json.dumps(record[wanted]), flush=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
