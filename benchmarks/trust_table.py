"""How well each score predicts measured damage on one trained model, all pairs at once, refined too, and of schemes.

    python benchmarks/trust_table.py --model smollm2 --out smollm2.json
    python benchmarks/trust_table.py --model FOLDER --name qwen2_5_coder_0_5b --out qwen.json
    python benchmarks/trust_table.py --device cpu --pairs wfp8_afp8 --captions 20 --held-out 2 --length 32 --out a.json

One model in float32. All pairs are scored in one pass per method on the first captions, then each group of each pair
is quantized alone on captions that were not scored, and at last schemes of several budgets, made from each score, as a
whole. The record is written after every pair, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.shipped import load_pairs
from layerbits.config import Settings
from layerbits.inputs.calibration import build_rows
from layerbits.inputs.captions import load_captions
from layerbits.provenance import provenance
from layerbits.results.assignment import UNQUANTIZED_BITS
from layerbits.results.bootstrap import standard_error
from layerbits.results.result import FloatArray
from layerbits.schemes.solver import pareto
from layerbits.scoring import kl, onepass
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.refine import refine
from layerbits.scoring.search import Search
from layerbits.scoring.suffix import SuffixRunner, find_blocks
from layerbits.stages.plan import Plan
from layerbits.stages.run import load_model, scoring_job
from layerbits.stages.workbench import workbench
from layerbits.trust.agreement import Captions, agreement
from layerbits.trust.measure import Damage, measure_damage
from layerbits.trust.rankers import gradient_token
from layerbits.trust.validate import calibrated_linears
from layerbits.trust.validation import ABOVE_FLOOR

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (
    *("wfp8_afp8", "wint4_afp16", "wint8_afp16", "wfp4_afp16", "wint8_aint8", "wfp8_afp16"),
    *("wint8_afp8", "wfp4_afp8", "wint4_afp8", "wint4_aint8", "wfp8_aint8", "wfp4_aint8"),
)
SAVED = (0.125, 0.25, 0.5, 0.75)
"""Share of the bits that quantizing everything saves, of the schemes that are measured."""


def planned(arguments: argparse.Namespace) -> Plan:
    """The pass over all pairs, as the main job composes it."""
    model = ["model=smollm2_135m"] if arguments.model == "smollm2" else [
        "model=hf", f"model.path={arguments.model}", f"model.name={arguments.name}",
    ]  # fmt: skip
    overrides = [
        *model, f"quant_pair={arguments.pairs.split(',')[0]}", f"dataset.size={arguments.captions}",
        f"model.dtype={arguments.dtype}", f"device={arguments.device}", f"autoquant.seq_len={arguments.length}",
        "experimental=true", "autoquant.effective_bits=12", "autoquant.draws=4", *arguments.overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = OmegaConf.to_container(compose("sensitivity", overrides), resolve=True)
    settings = Settings.from_config(composed)
    bench, pairs = workbench(settings), {p.name: p for p in load_pairs()}
    candidates = [
        resolve_candidate(pairs[name], settings.overlay, settings.fp4, experimental=True)
        for name in arguments.pairs.split(",")
    ]
    return bench.plan([(c, bench.check(c)) for c in candidates])


def scored(job: ScoringJob, search: Search, linears: Any, record: dict[str, Any]) -> dict[str, Scores]:
    """The job by every method, and refined."""
    found: dict[str, Scores] = {}
    of_fisher = replace(job, method="fisher", workdir=job.workdir / "fisher")  # steps are kept in folders of their own
    calls: dict[str, Callable[[], Scores]] = {
        "gradient": lambda: onepass.score(job),
        "fisher": lambda: onepass.score(of_fisher),
        "gradient_token": lambda: token_scores(job, search, linears, found["gradient"]),
        "gradient+refine": lambda: refine(job, found["gradient"], "auto"),
        "fisher+refine": lambda: refine(of_fisher, found["fisher"], "auto"),
        "kl_div": lambda: kl.score(replace(job, method="kl_div", workdir=job.workdir / "kl_div")),
    }
    for name, call in calls.items():
        synchronize()
        start = time.perf_counter()
        found[name] = call()
        synchronize()
        record["seconds"][name] = time.perf_counter() - start
        print(name, f"{record['seconds'][name]:.1f} s", flush=True)
    record["refined"] = {
        name: {
            c: [g.key for g, se in zip(s.groups, s.measured_se[:, i], strict=True) if np.isfinite(se)]
            for i, c in enumerate(job.configs)
        }
        for name, s in found.items()
        if s.measured_se is not None
    }
    record["factors"] = {name: dict(s.factors) for name, s in found.items() if s.factors}
    return found


def token_scores(job: ScoringJob, search: Search, linears: Any, like: Scores) -> Scores:
    """The gradient score summed over the features of a token, in the shape of another."""
    shares, tokens = gradient_token(job, linears, search)
    return replace(like, predicted_kl=shares.sum(axis=0), sample_kl=shares, sample_tokens=tokens.astype(np.int64))


def compared(found: dict[str, Scores], damage: Damage, c: int) -> dict[str, Any]:
    """Every score against the measured damage of one pair."""
    mean = damage.alone.mean
    keep = np.isfinite(mean) & (mean > ABOVE_FLOOR * damage.floor)
    rows: dict[str, Any] = {}
    for name, scores in found.items():
        assert scores.sample_kl is not None
        assert scores.sample_tokens is not None
        tokens = scores.sample_tokens.astype(float)
        samples = Captions(scores.sample_kl[:, :, c] * tokens.sum(), tokens)
        rows[name] = asdict(agreement(scores.predicted_kl[:, c], damage.alone, keep, True, samples))
    return {"counted": int(keep.sum()), "floor": float(damage.floor.max()), "agreement": rows}


def schemes(found: dict[str, Scores], pairs: list[str], bits: list[float]) -> list[dict[str, Any]]:
    """Schemes of single pairs by each score, at the same budgets; equal ones once."""
    made: dict[tuple[int, ...], dict[str, Any]] = {}
    for c, pair in enumerate(pairs):
        for saved in (*SAVED, 1.0):
            budget = UNQUANTIZED_BITS - saved * (UNQUANTIZED_BITS - bits[c])
            for name, scores in found.items():
                weights = [g.weights for g in scores.groups]
                (solution,) = pareto(scores.predicted_kl[:, [c]], {pair: bits[c]}, weights, [budget])
                groups = tuple(g for g, name in enumerate(solution.assignment) if name is not None)
                if not groups:
                    continue
                row = made.setdefault((c, *groups), {"pair": pair, "groups": list(groups), "bits": solution.bits})
                row.setdefault("by", {}).setdefault(f"{saved:g}", []).append(name)
                row.setdefault("predicted", {n: float(s.predicted_kl[list(groups), c].sum()) for n, s in found.items()})
    return list(made.values())


def measure_schemes(model: Any, linears: Any, search: Search, batches: Any, rows: list[dict[str, Any]],
                    pairs: list[str]) -> None:  # fmt: skip
    """Adds the measured KL of each scheme, with its standard error over the captions."""
    tiles = []
    for row in rows:
        one: dict[str, Any] = {}
        for g in row["groups"]:
            one |= linears.quantized(search, g, pairs.index(row["pair"]))
        tiles.append(one)
    samples = 1 + max(int(s.sample.max()) for b in batches for s in b.segments)
    sums, tokens = np.zeros((samples, len(rows))), np.zeros(samples)
    with fused_norms(model):
        blocks = find_blocks(model, search.names, batches[0])
        for batch in batches:
            owner = np.concatenate([s.sample[s.loss_mask].numpy() for s in batch.segments])
            runner = SuffixRunner(model, blocks, batch)
            for at, one in enumerate(tiles):
                np.add.at(sums[:, at], owner, runner.measure([one])[0][0].double().cpu().numpy())
            np.add.at(tokens, owner, 1)
    used = tokens > 0
    for at, row in enumerate(rows):
        row["kl"], row["kl_se"] = standard_error(sums[used, at], tokens[used])


def held_out(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """Rows of the captions behind the scored ones."""
    captions = load_captions("everyday", "768").captions[int(arguments.captions) :]
    rows = build_rows(captions, tokenizer, "packed", arguments.length, 8)
    return rows[: -(-arguments.held_out // 8)]


def synchronize() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Scores, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or the folder of a checkpoint")
    parser.add_argument("--name", default="smollm2_135m")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--dtype", default="float32", help="of the model; scores and damage are computed in it")
    parser.add_argument("--captions", default="262", help="captions scored: 262 fill 32 rows of 128")
    parser.add_argument("--held-out", type=int, default=40, help="held-out rows")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further settings of the main job")
    arguments = parser.parse_args()
    plan = planned(arguments)
    pairs = [c.info.name for c, _ in plan.candidates]
    loaded = load_model(plan)
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "provenance": provenance(ROOT),
        "model": asdict(loaded.info),
        "seconds": {},
        "pairs": {},
    }

    def write() -> None:
        arguments.out.write_text(json.dumps(record, indent=None, default=float) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        job = scoring_job(plan, loaded, Path(folder))
        search = Search.of(job)
        linears = calibrated_linears(job, search)
        found = scored(job, search, linears, record)
        batches = held_out(arguments, plan.tokenizer)
        record["groups"] = [{"key": g.key, "kind": g.kind, "weights": g.weights} for g in search.groups]
        record["bits"] = {c.info.name: c.info.bits for c, _ in plan.candidates}
        record["held_out_tokens"] = sum(b.loss_tokens for b in batches)
        record["score_tokens"] = sum(b.loss_tokens for b in job.calibration.score)
        write()
        start = time.perf_counter()
        for c, pair in enumerate(pairs):
            damage = measure_damage(loaded.model, linears, search, batches, False, candidate=c)
            mean = damage.alone.mean
            error = [standard_error(damage.alone.kl[:, g], damage.alone.tokens)[1] for g in range(len(mean))]
            record["pairs"][pair] = {
                **compared(found, damage, c),
                "together": damage.together_mean,
                "measured": rounded(mean),
                "measured_se": rounded(np.array(error)),
                "predicted": {name: rounded(scores.predicted_kl[:, c]) for name, scores in found.items()},
            }
            told = {n: round(a["spearman"]["value"], 3) for n, a in record["pairs"][pair]["agreement"].items()}
            print(pair, told, flush=True)
            write()
        record["seconds"]["measure"] = time.perf_counter() - start
        start = time.perf_counter()
        rows = schemes(found, pairs, [c.info.bits for c, _ in plan.candidates])
        for pair in pairs:
            mine = [row for row in rows if row["pair"] == pair]
            measure_schemes(loaded.model, linears, search, batches, mine, pairs)
            record.setdefault("schemes", []).extend(mine)
            write()
        record["seconds"]["schemes"] = time.perf_counter() - start
    write()
    print({k: round(v, 1) for k, v in record["seconds"].items()}, f"{len(rows)} schemes", flush=True)


def rounded(values: FloatArray) -> list[float]:
    """Six digits are enough of them."""
    return [float(f"{v:.6g}") for v in values]


if __name__ == "__main__":
    main()
