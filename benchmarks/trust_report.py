"""Tables of the records of ``trust_table.py``: rankings, refined ones, measured schemes, the factor of their sums.

    python benchmarks/trust_report.py results/A.json results/B.json

No model and no GPU.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

RANKERS = ("gradient", "gradient_token", "fisher", "kl_div")
REFINED = ("gradient+refine", "fisher+refine")


def rankings(record: dict[str, Any], what: str, form: str, names: tuple[str, ...]) -> list[str]:
    """A row per pair and a last one of the worst, with 90 % intervals where there is one ranker's room for them."""
    lines = [f"| pair | counted | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    values = []
    for pair, row in record["pairs"].items():
        found = [row["agreement"][name][what] for name in names]
        values.append([f["value"] for f in found])
        cells = [f"{f['value']:{form}} ({f['low']:{form}}–{f['high']:{form}})" for f in found]
        lines.append(f"| `{pair}` | {row['counted']} | {' | '.join(cells)} |")
    worst = np.min(values, axis=0)
    return [*lines, f"| worst | | {' | '.join(f'{v:{form}}' for v in worst)} |"]


def misjudged(record: dict[str, Any], name: str, count: int = 6) -> list[str]:
    """The groups whose measured / predicted is farthest from its pair's median, over all pairs."""
    keys = [g["key"] for g in record["groups"]]
    ratios = {}
    for pair, row in record["pairs"].items():
        ratio = np.array(row["measured"]) / np.array(row["predicted"][name])
        ratios[pair] = ratio / np.median(ratio)
    every = np.array(list(ratios.values()))
    off = np.exp(np.abs(np.log(np.maximum(every, 1e-12))).mean(axis=0))
    order = np.argsort(-off)[:count]
    lines = [
        "| group | off by (geometric mean over pairs) | lowest | highest measured / predicted, median 1 |",
        "|---|---|---|---|",
    ]
    return lines + [f"| {keys[g]} | {off[g]:.2f} | {every[:, g].min():.2f} | {every[:, g].max():.2f} |" for g in order]


def same_budget(record: dict[str, Any]) -> list[str]:
    """Measured KL of schemes by each score over that of the scheme by ``kl_div`` at the same budget, per pair."""
    names = ("gradient", "fisher", *REFINED)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in record["schemes"]:
        for saved, by in row["by"].items():
            for name in by:
                found.setdefault(row["pair"], {}).setdefault(saved, {})[name] = row["kl"]
    lines = [f"| pair | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    every = []
    for pair, budgets in found.items():
        part = [b for s, b in budgets.items() if s != "1" and "kl_div" in b and all(n in b for n in names)]
        if not part:
            continue
        ratios = np.array([[b[n] / b["kl_div"] for n in names] for b in part])
        every.append(ratios)
        cells = [f"{r.mean():.3f} (worst {r.max():.3f})" for r in ratios.T]
        lines.append(f"| `{pair}` | {' | '.join(cells)} |")
    if every:
        whole = np.concatenate(every)
        cells = [f"{r.mean():.3f} (worst {r.max():.3f})" for r in whole.T]
        lines.append(f"| mean | {' | '.join(cells)} |")
    return lines


def factor_errors(record: dict[str, Any], name: str) -> tuple[list[float], list[float], list[float]]:
    """|log measured / expected| of a scheme, by its sum, by one factor of three others, and by the nearest three."""
    before, after, near = [], [], []
    for pair in record["pairs"]:
        rows = [r for r in record["schemes"] if r["pair"] == pair and any(name in by for by in r["by"].values())]
        points = [(np.log(r["kl"] / r["predicted"][name]), np.log(r["predicted"][name])) for r in rows if r["kl"] > 0]
        for at, (ratio, size) in enumerate(points):
            others = [p for i, p in enumerate(points) if i != at]
            if len(others) < 3:
                continue
            before.append(abs(ratio))
            after += [abs(ratio - np.mean([p[0] for p in three])) for three in combinations(others, 3)]
            closest = sorted(others, key=lambda p: abs(p[1] - size))[:2]
            near.append(abs(ratio - np.mean([p[0] for p in closest])))
    return before, after, near


def told(errors: list[float]) -> str:
    """Median and 90th percentile, in percent."""
    return f"{np.expm1(np.median(errors)):.0%}, {np.expm1(np.quantile(errors, 0.9)):.0%}" if errors else "–"


def main() -> None:
    """Prints the tables of each record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    for path in parser.parse_args().records:
        record = json.loads(path.read_text("utf-8"))
        tokens = f"{record['score_tokens']:,} tokens scored, {record['held_out_tokens']:,} held out"
        print(f"\n# {record['model']['name']} ({tokens}, {len(record['groups'])} groups)\n")
        for what, form in (("spearman", ".3f"), ("top", ".0f"), ("within_2x", ".2f"), ("median_ratio", ".2f")):
            print(f"## {what}\n\n" + "\n".join(rankings(record, what, form, (*RANKERS, *REFINED))) + "\n")
        for name in ("gradient", "fisher"):
            print(f"## misjudged by {name}\n\n" + "\n".join(misjudged(record, name)) + "\n")
        counts = {n: [len(v) for v in pairs.values()] for n, pairs in record["refined"].items()}
        price = {n: record["seconds"][n] / record["seconds"]["kl_div"] for n in REFINED}
        print(f"refined groups {counts}, seconds of kl_div {price}, factors {record['factors']}\n")
        if "schemes" not in record:
            continue
        print("## schemes at equal budgets, KL over that of kl_div's\n\n" + "\n".join(same_budget(record)) + "\n")
        print("## does it add up: |measured / expected - 1|, median and 90th percentile\n")
        print("| by | sum alone | one factor of three others | mean of the two nearest |\n|---|---|---|---|")
        for name in (*RANKERS, *REFINED):
            print(f"| {name} | {' | '.join(told(e) for e in factor_errors(record, name))} |")
        for pair, row in record["pairs"].items():
            sums = {n: float(np.sum(row["predicted"][n])) for n in ("gradient", "fisher")}
            print(pair, {n: round(row["together"] / s, 2) for n, s in sums.items()})


if __name__ == "__main__":
    main()
