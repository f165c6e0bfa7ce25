"""How much faster schemes by milliseconds are than schemes by bits, at equal predicted KL: the solver alone, no GPU.

    python benchmarks/budget_ms.py qwen3_vl_4b RUN... --costs costs.json --out record.json

`RUN...` are result folders of the same calibration, one per candidate; `costs.json` is of the shape on the card. For
each budget in bits the scheme of least predicted KL is made, and then the fastest one that has no more KL, by halving
budgets in milliseconds until they are within 1 us. Prints a row per step and budget.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from predicted_steps import config_folder

from layerbits.atomic import write_json
from layerbits.checkpoint.sizes import scored_model
from layerbits.checkpoint.times import times_of
from layerbits.errors import UserError
from layerbits.history.scheme_inputs import load_scores
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.cost_table import CostTable, Step
from layerbits.schemes.make import from_scores
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import Source
from layerbits.serving.unscored import unscored

CLOSE = 1e-3
"""Milliseconds between the budgets that the search ends with."""


def scheme_in(source: Source, **budget: tuple[float, ...]) -> Scheme:
    """The scheme of least predicted KL under one budget."""
    (made,) = from_scores(SchemeSpec("bits", objective="predicted_kl", **budget), source)
    return made


def milliseconds(source: Source, scheme: Scheme) -> float:
    """The predicted step."""
    assert source.times is not None
    return 1000 * source.times.seconds(scheme.assignment)


def fastest(source: Source, scheme: Scheme) -> Scheme:
    """The fastest scheme that has no more predicted KL."""
    best, low, high = scheme, 0.0, milliseconds(source, scheme)
    while high - low > CLOSE:
        middle = (low + high) / 2
        try:
            made = scheme_in(source, budget_ms=(middle,))
        except UserError:  # below the floor
            made = None
        if made is not None and made.predicted_kl <= scheme.predicted_kl:
            best, high = made, min(middle, milliseconds(source, made))
        else:
            low = middle
    return best


def counts(scheme: Scheme) -> dict[str, int]:
    """How many groups have which candidate."""
    return {str(name): scheme.assignment.count(name) for name in (None, *(c.name for c in scheme.candidates))}


def main() -> None:
    """Makes the schemes of each step and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a function of shapes.py")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--steps", default="decode:1,decode:8,prefill:512")
    parser.add_argument("--bits", default="5,6,7,8,9,10,11,12,13,14,15")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    table, plain = CostTable.load(given.costs), load_scores(given.runs, None)
    with tempfile.TemporaryDirectory() as folder:
        shape = config_folder(given.model, Path(folder) / given.model)
        _, _, linears = scored_model(unscored(str(shape), [c.name for c in plain.candidates]), "a benchmark")
    rows = []
    print("| step | bits | predicted KL | ms by bits | ms by `budget_ms` | faster |\n|---|---:|---:|---:|---:|---:|")
    for name in given.steps.split(","):
        source = replace(plain, times=times_of(linears, plain, Step.parse(name), table))
        for bits in map(float, given.bits.split(",")):
            asked = scheme_in(source, effective_bits=(bits,))
            found = fastest(source, asked)
            before, after = milliseconds(source, asked), milliseconds(source, found)
            row = {"step": name, "bits": asked.effective_bits, "kl": asked.predicted_kl, "ms": before}
            row |= {"ms_by_budget": after, "kl_by_budget": found.predicted_kl, "bits_by_budget": found.effective_bits}
            rows.append({**row, "groups": counts(asked), "groups_by_budget": counts(found)})
            print(
                f"| {name} | {asked.effective_bits:.2f} | {asked.predicted_kl:.3g} | {before:.3f} | {after:.3f} | "
                f"{1 - after / before:.1%} |",
                flush=True,
            )
    gains = np.array([1 - row["ms_by_budget"] / row["ms"] for row in rows])
    print(f"faster by {gains.min():.1%} to {gains.max():.1%}, median {np.median(gains):.1%}")
    write_json(given.out, {"model": given.model, "runs": [Path(r).name for r in given.runs], "rows": rows})


if __name__ == "__main__":
    main()
