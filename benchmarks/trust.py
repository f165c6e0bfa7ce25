"""How well each metric predicts the measured damage of a trained model, pair by pair.

    python benchmarks/trust.py --out record.json
    python benchmarks/trust.py --pairs wfp8_afp8,wint4_afp16 --device cpu --rows 8 --windows "" --out record.json

Scores 32 rows of 128 tokens of the everyday captions in float32, measures every group alone on 8 held-out rows, and
ranks the rankers; with ``--windows`` the ``fisher`` method is taken apart: labels that came true or drawn ones, 1 or 4
draws, errors summed over windows of 1 to 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from layerbits.config import Settings
from layerbits.results.manifest import load_manifest
from layerbits.results.result import FloatArray
from layerbits.scoring import fisher
from layerbits.scoring.job import kl_weights
from layerbits.scoring.search import Search
from layerbits.sensitivity import plan
from layerbits.stages.plan import Plan
from layerbits.stages.run import load_model, run, scoring_job
from layerbits.stages.write import write
from layerbits.trust.rankers import RANKERS
from layerbits.trust.reproduce import plan_of_run
from layerbits.trust.validate import ValidateSettings, calibrated_linears, validate, write_validation
from layerbits.trust.validation import Prediction, Validation

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (
    *("wfp8_afp8", "wint8_aint8", "wint8_afp16", "wint4_afp16", "wfp8_afp16", "wint8_afp8"),
    *("wfp4_afp16", "wfp4_afp8", "wint4_afp8", "wint4_aint8", "wfp8_aint8", "wfp4_aint8"),
)


def settings_of(pair: str, arguments: argparse.Namespace) -> Settings:
    """One run's settings, as the main job composes them."""
    overrides = [
        f"quant_pair={pair}", "dataset.size=large", f"autoquant.num_score_samples={arguments.captions}",
        "model.dtype=float32", f"device={arguments.device}", f"output_root={arguments.work}", "experimental=true",
        *arguments.overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = OmegaConf.to_container(compose("sensitivity", overrides), resolve=True)
    return Settings.from_config(composed)


def windows(found: Validation, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fisher score taken apart, against the same measurement."""
    planned = plan_of_run(str(folder), load_manifest(folder), arguments.device, ROOT / "configs")
    job = scoring_job(planned, load_model(planned), Path())
    search = Search.of(job)
    linears = calibrated_linears(job, search)
    batches, groups = job.calibration.score, len(search.groups)
    weights = kl_weights(np.array([b.loss_tokens for b in batches], dtype=np.float64))
    sizes = [int(w) for w in arguments.windows.split(",")]
    draws = {"came_true": 1, "drawn": 4}
    kl = {(labels, draw, w): np.zeros(groups) for labels, n in draws.items() for draw in range(n) for w in sizes}
    for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        for labels, count in draws.items():
            for draw in range(count):
                drawn = fisher.drawn_labels(job.seed, index, draw)
                came_true = lambda _logits, targets: targets  # noqa: E731
                signed = linears.score(batch, False, came_true if labels == "came_true" else drawn)
                for w in sizes:
                    windows = fisher.windowed(signed.by_token, signed.owner, batch, search.group_of, groups, w)
                    squares = windows[:, 0].double()
                    kl[labels, draw, w] += weight * squares.sum(dim=-1).cpu().numpy()
    rows = {}
    for labels, count in (("came_true", 1), ("drawn", 1), ("drawn", 4)):
        for w in sizes:
            predicted = np.mean([kl[labels, draw, w] for draw in range(count)], axis=0)
            agreed = found.agreement(Prediction("", predicted, True, None, 0.0))
            rows[f"{labels} x{count}, window {w}"] = {k: v["value"] for k, v in asdict(agreed).items() if k != "groups"}
    return rows


def cross(planned: Plan, predicted: FloatArray, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same scores on another device: largest relative difference and rank correlation."""
    other = plan(replace(planned.settings, device=arguments.cross))
    (outcome,) = run(other, ROOT)
    again = outcome.result.predicted_kl
    return {
        "devices": [planned.device, other.device],
        "max_relative": float(np.abs(again / predicted - 1).max()),
        "spearman": float(spearmanr(again, predicted).statistic),
        "same_ranks": int((np.argsort(again) == np.argsort(predicted)).sum()),
        "groups": len(again),
    }


def main() -> None:
    """Scores and validates each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="held-out rows")
    parser.add_argument("--captions", default="262", help="captions scored: 262 fill 32 rows of 128")
    parser.add_argument("--windows", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--cross", default="", help="another device to score on too")
    parser.add_argument("--rankers", default=",".join(RANKERS))
    parser.add_argument("--work", type=Path, default=Path("outputs/trust"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further settings of the main job")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "pairs": {}}
    how = ValidateSettings(arguments.rows, 8, False, tuple(arguments.rankers.split(",")), arguments.device)
    for pair in arguments.pairs.split(","):
        start = time.perf_counter()
        settings = settings_of(pair, arguments)
        planned = plan(settings)
        (outcome,) = run(planned, ROOT)
        folder = write(outcome, settings)
        found = validate(str(folder), load_manifest(folder), how, ROOT / "configs", ROOT)
        write_validation(found, arguments.work)
        plain = found.to_json()
        keys = ("held_out", "noise_floor", "measured_kl_together", "repeated_difference", "agreement", "seconds")
        row = {k: plain[k] for k in keys}
        row["agreement_by_kind"] = {
            p.name: {kind: found.agreement(p, kind).spearman.value for kind in found.kinds} for p in found.predictions
        }
        row["score_rows"] = outcome.result.calibration.score_rows
        row["predicted_kl_sum"] = {p.name: float(np.nansum(p.predicted)) for p in found.predictions if p.in_nats}
        if arguments.cross:
            row["cross"] = cross(planned, outcome.result.predicted_kl, arguments)
        if arguments.windows:
            row["windows"] = windows(found, folder, arguments)
        record["pairs"][pair] = row
        record["provenance"] = dict(found.provenance)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        told = {name: round(a["spearman"]["value"], 3) for name, a in plain["agreement"].items()}
        print(pair, f"{time.perf_counter() - start:.0f} s", told, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
