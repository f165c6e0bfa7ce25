"""How far the verdicts on answers can be trusted (docs/answers.md).

python benchmarks/answers.py planted                              # regressions of 2 %: found as often as stated?
python benchmarks/answers.py alarms FOLDER --tasks cloze,sums --limit 300   # the same model, other batch sizes
python benchmarks/answers.py table EVALUATION.json ...            # KL against accuracy, widths, predicted changes
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from layerbits.answers.evaluation import TaskAnswers, log_odds_changes
from layerbits.answers.paired import Paired, detectable, mean_interval, power

NEAR_LOSSLESS = 0.02
"""Measured KL, nats per token, up to which a scheme counts as near lossless."""
DRAWS = 2000


def planted(rate: float, repeats: int) -> None:
    """Plants regressions on answers with and without background flips, and counts how many are found."""
    rng = np.random.default_rng(0)
    print("| documents | flips for no reason | planted | stated power | found | smallest that 80 % find |")
    print("|---|---|---|---|---|---|")
    for n in (164, 256, 500, 1000, 2000):
        for noise in (0.0, 0.01, 0.04):
            before = rng.random((repeats, n)) < 0.7
            change = rng.random((repeats, n))
            after = before.copy()
            # A flip hits right and wrong answers alike; the planted ones only take right answers away.
            after[change < noise] ^= True
            after[(change >= noise) & (change < noise + rate / 0.7)] = False
            lost, won = (before & ~after).sum(1), (~before & after).sum(1)
            cells, times = np.unique(np.stack([lost, won]), axis=1, return_counts=True)
            seen = [Paired(0, int(a), int(b), n - int(a + b)).p_value <= 0.05 for a, b in cells.T]
            found = float(np.average(seen, weights=times))
            stated = power(n, rate + 0.7 * noise, 0.3 * noise)
            print(f"| {n} | {noise:.0%} | {rate:.0%} | {stated:.3f} | {found:.3f} | {detectable(n, noise):.3f} |")


def alarms(reference: str, tasks: str, limit: int, sizes: int, device: str, out: Path) -> None:
    """Asks one unquantized model with many batch sizes, and compares each pair of them."""
    from layerbits.answers.harness import Harness
    from layerbits.answers.settings import TaskSettings
    from layerbits.history.scheme_inputs import load_scores
    from layerbits.probing.loading import prepare
    from layerbits.schemes.catalog import SchemeSpec
    from layerbits.schemes.make import make_schemes
    from layerbits.schemes.settings import listed

    spec = SchemeSpec.from_mapping({"name": "none", "effective_bits": [16], "candidates": [], "objective": "score"})
    (scheme,) = make_schemes([spec], load_scores([reference]))
    prepared = prepare(scheme)
    model = prepared.load(device, whole=True)
    answers: dict[str, list[TaskAnswers]] = {}
    for size in range(3, 3 + sizes):
        harness = Harness(TaskSettings(tuple(listed(tasks)), limit=limit, batch_size=size), prepared.captions.held_out)
        for task, found in harness.answers(harness.wrap(model.model, model.tokenizer)).items():
            answers.setdefault(task, []).append(found)
    result = {}
    for task, each in answers.items():
        pairs = list(combinations(each, 2))
        counts = [Paired.of([a.right for a in x.answers], [a.right for a in y.answers]) for x, y in pairs]
        odds = [log_odds_changes(x.answers, y.answers) for x, y in pairs]
        ends = [mean_interval(o) for o in odds if o is not None]
        result[task] = {
            "dtype": model.info.dtype,
            "documents": len(each[0].answers),
            "comparisons": len(pairs),
            "alarms": sum(c.p_value <= 0.05 for c in counts),
            "flips": float(np.mean([c.lost + c.won for c in counts])),
            "most_flips": max(c.lost + c.won for c in counts),
            "log_odds_alarms": sum(not e.low <= 0 <= e.high for e in ends),
            "log_odds_sd": float(np.mean([o.std() for o in odds if o is not None])) if ends else None,
        }
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def table(files: list[Path]) -> None:
    """Schemes of several evaluations in one table per task, and what KL says of accuracy."""
    found = [json.loads(path.read_text()) for path in files]
    for task in dict.fromkeys(t for one in found for t in one["unquantized"]):
        rows = []
        for one in found:
            if task not in one["unquantized"]:
                continue
            before = TaskAnswers.from_json(one["unquantized"][task])
            for scheme in one["schemes"]:
                after = TaskAnswers.from_json(scheme["tasks"][task])
                rows.append(_row(one, scheme, before, after, task))
        print(f"\n**{task}**: {rows[0]['n']} documents\n")
        print(
            "| model | pair | bits | KL | accuracy | lost / won | difference (points) | log-odds (nats) | verdict | ρ |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            print(row["line"])
        print(f"\nwidth, paired / unpaired: median {np.median([row['width'] for row in rows]):.2f}, "
              f"largest {max(row['width'] for row in rows):.2f}")  # fmt: skip
        for name in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == name]
            near = [row for row in mine if row["kl"] <= NEAR_LOSSLESS]
            for what, part in (("all", mine), (f"KL ≤ {NEAR_LOSSLESS:g}", near)):
                if len(part) >= 4:
                    print(f"{name}, {what}: {len(part)} schemes, Spearman of KL with accuracy {_spearman(part)}")


def _row(
    one: dict[str, Any], scheme: dict[str, Any], before: TaskAnswers, after: TaskAnswers, task: str
) -> dict[str, Any]:
    right = [[a.right for a in each.answers] for each in (before, after)]
    paired = Paired.of(*right)
    difference = paired.difference
    (verdict,) = [v for v in one["verdicts"] if v["task"] == task and v["scheme"] == scheme["scheme"]]
    odds = log_odds_changes(before.answers, after.answers)
    told, rho = "–", "–"
    if odds is not None:
        ends = mean_interval(odds)
        told = f"{ends.value:+.3f} ({ends.low:+.3f} to {ends.high:+.3f})"
        predicted = scheme.get("predicted", {}).get(task)
        if predicted and np.ptp(predicted) and np.ptp(odds):
            rho = f"{stats.spearmanr(predicted, odds).statistic:.2f}"
    kl = np.nan if scheme["kl"] is None else scheme["kl"]
    pair = Path(one["source_run_ids"][0]).name.split("_small_")[0].split("_medium_")[0]
    return {
        "model": one["model"]["name"],
        "n": paired.n,
        "kl": kl,
        "right": np.asarray(right[1], dtype=float),
        "width": (difference.high - difference.low) / paired.unpaired_width if paired.unpaired_width else np.nan,
        "line": f"| {one['model']['name']} | {pair} | {scheme['effective_bits']:.2f} | {kl:.4g} | "
        f"{100 * paired.accuracies[1]:.1f} % | {paired.lost} / {paired.won} | {100 * difference.value:+.1f} "
        f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f}) | {told} | {verdict['verdict']} | {rho} |",
    }  # fmt: skip


def _spearman(rows: list[dict[str, Any]]) -> str:
    """Spearman over schemes with a 95 % interval from the documents drawn again."""
    kl, right = np.asarray([row["kl"] for row in rows]), np.stack([row["right"] for row in rows])
    rng = np.random.default_rng(0)
    n = right.shape[1]
    accuracies = np.stack([right[:, rng.integers(0, n, n)].mean(1) for _ in range(DRAWS)])
    drawn = [stats.spearmanr(kl, a).statistic for a in accuracies if np.ptp(a)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = stats.spearmanr(kl, right.mean(1)).statistic
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("planted")
    job.add_argument("--rate", type=float, default=0.02)
    job.add_argument("--repeats", type=int, default=4000)
    job = jobs.add_parser("alarms")
    job.add_argument("reference")
    job.add_argument("--tasks", default="cloze,sums")
    job.add_argument("--limit", type=int, default=300)
    job.add_argument("--sizes", type=int, default=21)
    job.add_argument("--device", default="auto")
    job.add_argument("--out", type=Path, default=Path("alarms.json"))
    job = jobs.add_parser("table")
    job.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.job == "planted":
        planted(given.rate, given.repeats)
    elif given.job == "alarms":
        alarms(given.reference, given.tasks, given.limit, given.sizes, given.device, given.out)
    else:
        table(given.files)
