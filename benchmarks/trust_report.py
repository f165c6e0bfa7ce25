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

from layerbits.scoring.refine import _scales
from layerbits.trust.stability import overlap, spearman

RANKERS = ("gradient", "gradient_token", "fisher", "kl_div")
REFINED = ("gradient+refine", "fisher+refine")
SHOWN = ("gradient", "gradient_token", "fisher", "fisher+refine", "kl_div")
FIRST_BLOCKS = 4
"""Blocks that are left out to see whether misjudged groups lie there."""

Record = dict[str, Any]


def cell(value: float, digits: int) -> str:
    """A number without the zero before its point, as the pages write shares and correlations."""
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def rankings(record: Record, what: str, digits: int, names: tuple[str, ...]) -> list[str]:
    """A row per pair with 90% intervals, and a last one of the worst."""
    lines = [f"| pair | {' | '.join(f'`{n}`' for n in names)} |", f"|---|{'---|' * len(names)}"]
    values = []
    for pair, row in record["pairs"].items():
        found = [row["agreement"][name][what] for name in names]
        values.append([f["value"] for f in found])
        cells = [f"{cell(f['value'], digits)} ({cell(f['low'], digits)}–{cell(f['high'], digits)})" for f in found]
        lines.append(f"| `{pair}` | {' | '.join(cells)} |")
    worst = np.min(values, axis=0)
    return [*lines, f"| worst | {' | '.join(cell(v, digits) for v in worst)} |"]


def span(values: list[float], digits: int) -> str:
    """Lowest to highest."""
    low, high = cell(min(values), digits), cell(max(values), digits)
    return low if low == high else f"{low}–{high}"


def summary(record: Record) -> list[str]:
    """A row per ranker: the lowest and highest of the pairs."""
    wholes = {n: [r["together"] / float(np.sum(r["predicted"][n])) for r in record["pairs"].values()] for n in _all()}
    lines = ["| ranker | Spearman | top 10 | mean | within 2× | measured / predicted | whole / sum |", "|" + "---|" * 7]
    for name in _all():
        of = {
            what: [row["agreement"][name][what]["value"] for row in record["pairs"].values()]
            for what in ("spearman", "top", "within_2x", "median_ratio")
        }
        within = f"{min(of['within_2x']):.0%}–{max(of['within_2x']):.0%}"
        lines.append(
            f"| `{name}` | {span(of['spearman'], 3)} | {span(of['top'], 0)} | {np.mean(of['top']):.1f} | {within} | "
            f"{min(of['median_ratio']):.2f}–{max(of['median_ratio']):.2f} | "
            f"{min(wholes[name]):.2f}–{max(wholes[name]):.2f} |"
        )
    alone = [r["together"] / float(np.sum(r["measured"])) for r in record["pairs"].values()]
    return [*lines, f"| measured, each alone | | | | | | {min(alone):.2f}–{max(alone):.2f} |"]


def _all() -> tuple[str, ...]:
    return (*RANKERS, *REFINED)


def magnitudes(record: Record) -> list[str]:
    """Per pair: shares within a factor of two, median ratios, and the whole over the sum of predictions."""
    names = ("gradient", "fisher", "fisher+refine")
    heads = [f"{what} `{n}`" for what in ("within 2×", "ratio", "whole / sum") for n in names]
    lines = [f"| pair | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for pair, row in record["pairs"].items():
        of = row["agreement"]
        cells = [f"{of[n]['within_2x']['value']:.0%}" for n in names]
        cells += [f"{of[n]['median_ratio']['value']:.2f}" for n in names]
        cells += [f"{row['together'] / float(np.sum(row['predicted'][n])):.2f}" for n in names]
        lines.append(f"| `{pair}` | {' | '.join(cells)} |")
    return lines


def within_kinds(record: Record) -> list[str]:
    """Spearman correlation within each kind of linear: lowest of the pairs, and their median."""
    kinds = np.array([g["kind"] for g in record["groups"]])
    lines = [f"| kind | {' | '.join(f'`{n}`' for n in SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    for kind in dict.fromkeys(kinds.tolist()):
        at = kinds == kind
        cells = []
        for name in SHOWN:
            found = [rank(np.array(r["predicted"][name])[at], np.array(r["measured"])[at]) for r in _pairs(record)]
            cells.append(f"{cell(min(found), 2)}, {cell(float(np.median(found)), 2)}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _pairs(record: Record) -> list[Record]:
    return list(record["pairs"].values())


def _blocks(record: Record) -> np.ndarray:
    return np.array([int(g["key"][1:3]) for g in record["groups"]])


def rank(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Spearman correlation."""
    return float(spearman(predicted[None], measured[None])[0])


def first_blocks(record: Record) -> list[str]:
    """What the first blocks have to do with it: the rankings without them, and where the missed of the top 10 lie."""
    early = _blocks(record) < FIRST_BLOCKS
    lines = ["| ranker | Spearman | mean of the top 10 | within 2× | sum measured / predicted |", "|" + "---|" * 5]
    for name in SHOWN:
        found = [(np.array(r["predicted"][name])[~early], np.array(r["measured"])[~early]) for r in _pairs(record)]
        within = min(float((abs(np.log(m / p)) < np.log(2)).mean()) for p, m in found)
        tops = np.mean([float(overlap(p[None], m[None], 10)[0]) for p, m in found])
        sums = [float(m.sum() / p.sum()) for p, m in found]
        ranks = span([rank(p, m) for p, m in found], 3)
        lines.append(f"| `{name}` | {ranks} | {tops:.1f} | ≥ {within:.0%} | {min(sums):.2f}–{max(sums):.2f} |")
    for name in ("fisher", "kl_div"):
        missed = []
        for row in _pairs(record):
            tops = [set(np.argsort(-np.array(v))[:10].tolist()) for v in (row["measured"], row["predicted"][name])]
            missed += list(tops[0] - tops[1])
        inside = sum(bool(early[g]) for g in missed)
        lines += ["", f"{name} misses {len(missed)} of the top 10s, {inside} of them in blocks 0 to {FIRST_BLOCKS - 1}"]
    errors = np.array([np.array(r["measured_se"]) / np.array(r["measured"]) for r in _pairs(record)])
    shares = [float(np.array(r["measured"])[early].sum() / np.sum(r["measured"])) for r in _pairs(record)]
    for where, at in (("these blocks", early), ("all others", ~early)):
        lines.append(f"standard error of a measured KL, {where}: median {np.median(errors[:, at]):.1%}, "
                     f"most {errors[:, at].max():.0%}")  # fmt: skip
    return [*lines, f"share of these blocks in the sum of measured KL: {min(shares):.0%}–{max(shares):.0%}"]


def refined_again(record: Record, name: str) -> list[str]:
    """What refining gives where the rest is scaled by one factor, by kind of linear, and not at all."""
    keys, kinds = [g["key"] for g in record["groups"]], [g["kind"] for g in record["groups"]]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for pair, row in record["pairs"].items():
        mine = [keys.index(k) for k in record["refined"][f"{name}+refine"][pair]]
        before, measured = np.array(row["predicted"][name]), np.array(row["measured"])
        known = np.array(row["predicted"][f"{name}+refine"])[mine]
        factor, by_kind = _scales(known, before[mine], mine, kinds)
        for how, scale in (("one factor", factor), ("by kind of linear", by_kind), ("not scaled", 1.0)):
            values = before * scale
            values[mine] = known
            within = float((abs(np.log(measured / values)) < np.log(2)).mean())
            top = float(overlap(values[None], measured[None], 10)[0])
            found.setdefault(how, []).append((rank(values, measured), top, within))
    lines = [
        "| the others are scaled | worst Spearman, mean | worst top 10, mean | worst within 2×, mean |",
        "|---|---|---|---|",
    ]
    for how, rows in found.items():
        ranks, tops, within = np.array(rows).T
        cells = [f"{cell(ranks.min(), 3)}, {cell(ranks.mean(), 3)}", f"{tops.min():.0f}, {tops.mean():.1f}"]
        lines.append(f"| {how} | {' | '.join(cells)} | {within.min():.0%}, {within.mean():.0%} |")
    return lines


def price(record: Record, name: str) -> str:
    """Groups that were measured again, and what running the blocks behind them takes of running them for all."""
    blocks, keys = _blocks(record), [g["key"] for g in record["groups"]]
    behind = blocks.max() + 1 - blocks
    picked = [[keys.index(k) for k in those] for those in record["refined"][name].values()]
    shares = [float(behind[those].sum() / behind.sum()) for those in picked]
    counts = [len(those) for those in picked]
    seconds = record["seconds"][name] / record["seconds"]["kl_div"]
    runs = f"{min(shares):.0%} to {max(shares):.0%} of the blocks that kl_div runs, {seconds:.0%} of its seconds"
    return f"{name}: {min(counts)} to {max(counts)} groups a pair, {runs}"


def misjudged(record: Record, name: str, count: int = 6) -> list[str]:
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


def same_budget(record: Record) -> list[str]:
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


def factor_errors(record: Record, name: str) -> tuple[list[float], list[float], list[float]]:
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
        print("## all pairs\n\n" + "\n".join(summary(record)) + "\n")
        for what, digits in (("spearman", 2), ("top", 0)):
            print(f"## {what}\n\n" + "\n".join(rankings(record, what, digits, SHOWN)) + "\n")
        print("## magnitude\n\n" + "\n".join(magnitudes(record)) + "\n")
        print("## within a kind of linear: lowest and median of the pairs\n\n" + "\n".join(within_kinds(record)) + "\n")
        print("## without the first blocks\n\n" + "\n".join(first_blocks(record)) + "\n")
        for name in ("gradient", "fisher"):
            print(f"## misjudged by {name}\n\n" + "\n".join(misjudged(record, name)) + "\n")
            print(f"## {name} refined\n\n" + "\n".join(refined_again(record, name)) + "\n")
        print("\n".join(price(record, name) for name in REFINED) + "\n")
        if "schemes" not in record:
            continue
        print("## schemes at equal budgets, KL over that of kl_div's\n\n" + "\n".join(same_budget(record)) + "\n")
        print("## does it add up: |measured / expected - 1|, median and 90th percentile\n")
        print("| by | sum alone | one factor of three others | mean of the two nearest |\n|---|---|---|---|")
        for name in (*RANKERS, *REFINED):
            print(f"| {name} | {' | '.join(told(e) for e in factor_errors(record, name))} |")


if __name__ == "__main__":
    main()
