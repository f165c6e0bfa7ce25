"""How far the verdicts on answers can be trusted (docs/answers.md).

python benchmarks/answers.py planted                              # regressions of 2%: found as often as stated?
python benchmarks/answers.py alarms FOLDER --tasks cloze,sums --limit 300   # the same model, other batch sizes
python benchmarks/answers.py table EVALUATION.json ... [--out FILE]   # KL against accuracy, widths, predicted changes
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from layerbits.answers.evaluation import Evaluation, TaskAnswers, log_odds_changes, read_evaluation
from layerbits.answers.paired import Interval, Paired, Verdict, detectable, mean_interval, power
from layerbits.results.result import FloatArray

NEAR_LOSSLESS = 0.02
"""Measured KL, nats per token, up to which a scheme counts as near lossless."""
DRAWS = 2000


def planted(rate: float, repeats: int) -> None:
    """Plants regressions on answers with and without background flips, and counts how many are found."""
    rng = np.random.default_rng(0)
    print("| documents | flips for no reason | planted | stated power | found | smallest that 80% find |")
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
    from layerbits.inputs.datasets import held_out_captions
    from layerbits.probing.loading import prepare
    from layerbits.schemes.catalog import SchemeSpec
    from layerbits.schemes.make import make_schemes
    from layerbits.schemes.settings import listed

    spec = SchemeSpec.from_mapping({"name": "none", "effective_bits": [16], "candidates": [], "objective": "score"})
    (scheme,) = make_schemes([spec], load_scores([reference]))
    prepared = prepare(scheme)
    model = prepared.load(device, whole=True)
    held_out = held_out_captions(prepared.captions.held_out)
    answers: dict[str, list[TaskAnswers]] = {}
    for size in range(3, 3 + sizes):
        harness = Harness(TaskSettings(tuple(listed(tasks)), limit=limit, batch_size=size), held_out)
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


def table(files: list[Path], out: Path | None) -> None:
    """Schemes of several evaluations in one table per model, and what KL says of accuracy and log-odds."""
    found = [read_evaluation(path) for path in files]
    rows = [row for one in found for row in _rows(one)]
    record: dict[str, Any] = {"rows": [row.record for row in rows], "near_lossless": NEAR_LOSSLESS, "draws": DRAWS}
    spearman = record["spearman"] = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        tasks = list(dict.fromkeys(row.task for row in mine))
        _print_schemes(model, mine, tasks)
        print("\n| task | schemes | Spearman of KL with accuracy | with log-odds |\n|---|---|---|---|")
        for task in tasks:
            every = [row for row in mine if row.task == task]
            near = [row for row in every if row.kl <= NEAR_LOSSLESS]
            for what, part in (("all", every), (f"KL ≤ {NEAR_LOSSLESS:g}", near)):
                if len(part) < 4:
                    continue
                kl = np.asarray([row.kl for row in part])
                ends = [_of_means(kl, np.stack(values)) for values in (
                    [row.right for row in part], [row.odds for row in part if row.odds is not None])
                    if len(values) == len(part)]  # fmt: skip
                cells = [f"{e.value:+.2f} ({e.low:+.2f} to {e.high:+.2f})" for e in ends]
                print(f"| `{task}` | {what}: {len(part)} | {' | '.join(cells)} |")
                which = {"model": model, "task": task, "schemes": len(part), "which": what}
                spearman.append(which | {k: asdict(e) for k, e in zip(("accuracy", "log_odds"), ends, strict=False)})
    print("\n| pair | comparisons | paired / unpaired width, median (largest) | at most 1/2 | predicted against "
          "measured log-odds, Spearman: lowest budget | all |\n|---|---|---|---|---|---|")  # fmt: skip
    for model, pair in dict.fromkeys((row.model, row.pair) for row in rows):
        part = [row for row in rows if (row.model, row.pair) == (model, pair)]
        widths = [row.record["width"] for row in part]
        rho = [row.record["predicted_spearman"]["value"] for row in part if row.record["predicted_spearman"]]
        least = min(row.record["bits"] for row in part)
        lowest = [f"`{row.task}` {r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for row in part
                  if row.record["bits"] == least and (r := row.record["predicted_spearman"])]  # fmt: skip
        said = f"{', '.join(lowest)} | {min(rho):.2f} to {max(rho):.2f}" if rho else "not asked | –"
        print(f"| {model}, `{pair}` | {len(part)} | {np.median(widths):.2f} ({max(widths):.2f}) | "
              f"{sum(w <= 0.5 for w in widths)} | {said} |")  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True, eq=False)
class _Row:
    """A scheme on a task: ``right`` and ``odds`` are of its ``[n]`` documents, ``record`` is what is kept of it."""

    model: str
    pair: str
    task: str
    kl: float
    right: FloatArray
    odds: FloatArray | None
    verdict: Verdict
    record: dict[str, Any]


def _rows(one: Evaluation) -> list[_Row]:
    pair = Path(one.source_run_ids[0]).name.split("_small_")[0].split("_medium_")[0]
    verdicts, rows = one.verdicts(), []
    for scheme in one.schemes:
        for task in one.unquantized:
            verdict, odds = verdicts[task, scheme.scheme], one.log_odds_changes(task, scheme)
            difference, paired, predicted = verdict.difference, verdict.paired, scheme.predicted.get(task)
            rho = None
            if odds is not None and predicted is not None:
                drawn = _drawn(len(odds))
                ends = np.quantile(_spearman(np.asarray(predicted)[drawn], odds[drawn]), [0.025, 0.975])
                rho = {"value": one.predicted_spearman(task, scheme), "low": ends[0], "high": ends[1]}
            record = {
                "model": one.model.name,
                "pair": pair,
                "task": task,
                "bits": scheme.effective_bits,
                "kl": scheme.kl,
                "kl_se": scheme.kl_se,
                "documents": paired.n,
                "accuracy_unquantized": paired.accuracies[0],
                "accuracy": paired.accuracies[1],
                "lost": paired.lost,
                "won": paired.won,
                "difference": asdict(difference),
                "log_odds": None if verdict.log_odds is None else asdict(verdict.log_odds),
                "p_value": verdict.p_value,
                "p_holm": verdict.adjusted,
                "verdict": verdict.words,
                "within_margin": verdict.within_margin,
                "width": (difference.high - difference.low) / paired.unpaired_width,
                "predicted_spearman": rho,
                "predicted_signs": one.predicted_flips(task, scheme) if rho else None,
            }
            right = np.asarray([a.right for a in scheme.tasks[task].answers], dtype=float)
            rows.append(_Row(one.model.name, pair, task, scheme.kl, right, odds, verdict, record))
    return rows


def _print_schemes(model: str, rows: list[_Row], tasks: list[str]) -> None:
    """A line per scheme: of each task accuracy, lost / won and the mean change of log-odds; and the verdicts."""
    first = {row.task: row.record for row in reversed(rows)}
    heads = [f"`{t}` ({first[t]['documents']}; {100 * first[t]['accuracy_unquantized']:.1f}%)" for t in tasks]
    print(f"\n**{model}**\n\n| pair | bits | KL | {' | '.join(heads)} | worse | not worse than the margin |")
    print("|---|---|---|" + "---|" * len(tasks) + "---|---|")
    for pair, bits in dict.fromkeys((row.pair, row.record["bits"]) for row in rows):
        part = {row.task: row for row in rows if (row.pair, row.record["bits"]) == (pair, bits)}
        cells = []
        for task in tasks:
            one = part[task].record
            odds = f", {one['log_odds']['value']:+.2f}" if one["log_odds"] else ""
            cells.append(f"{100 * one['accuracy']:.1f}%, {one['lost']} / {one['won']}{odds}")
        worse = [f"`{t}` by {row.verdict.words.split(' by ')[1].split(' points')[0]}" for t, row in part.items()
                 if row.verdict.kind == "worse"]  # fmt: skip
        inside = [f"`{t}`" for t, row in part.items() if row.verdict.within_margin]
        kl = part[tasks[0]].kl
        print(f"| `{pair}` | {bits:.2f} | {kl:.3g} | {' | '.join(cells)} | {', '.join(worse) or '–'} | "
              f"{', '.join(inside) or '–'} |")  # fmt: skip


def _drawn(n: int) -> NDArray[np.intp]:
    """``[DRAWS, n]`` documents drawn with replacement, the same for all schemes."""
    return np.random.default_rng(0).integers(0, n, (DRAWS, n))


def _of_means(kl: FloatArray, values: FloatArray) -> Interval:
    """Spearman over schemes of KL with the mean over documents, its 95% interval from documents drawn again.

    Args:
        kl: ``[schemes]``.
        values: ``[schemes, documents]``.
    """
    means = np.stack([one[_drawn(len(one))].mean(1) for one in values], axis=1)
    drawn = _spearman(np.broadcast_to(kl, means.shape), means)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(float(stats.spearmanr(kl, values.mean(1)).statistic), float(low), float(high))


def _spearman(x: FloatArray, y: FloatArray) -> FloatArray:
    """``[draws]`` Spearman of ``[draws, n]`` values; NaN where one of them does not vary."""
    a, b = (stats.rankdata(v, axis=1) for v in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


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
    job.add_argument("--out", type=Path, help="also write the numbers as JSON")
    given = parser.parse_args()
    if given.job == "planted":
        planted(given.rate, given.repeats)
    elif given.job == "alarms":
        alarms(given.reference, given.tasks, given.limit, given.sizes, given.device, given.out)
    else:
        table(given.files, given.out)
