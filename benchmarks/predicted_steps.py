"""Steps of mixed schemes as a table of costs predicts them, beside those that vLLM was measured to take.

    python benchmarks/predicted_steps.py qwen3_8b --out OUT --candidates wfp8_afp8,wint4_afp16/w_group128
    python benchmarks/predicted_steps.py tiny_llama --out OUT --candidates wint4_afp16/w_group128 --prefill 64

A model of `shapes.py` with random weights, for speed does not read them. The table is measured first (`OUT/costs.json`;
one that is there is used), then vLLM is started on each scheme: every group under a candidate drawn at random, or in 16
bits. The unquantized model is timed again, too: how far off it is, is noise. Checkpoints are of compressed-tensors, so
candidates are those that it says. Prints a row per scheme and step; `OUT/predicted_steps.json` has all times.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapes

from layerbits.atomic import write_json
from layerbits.checkpoint.label import COMPRESSED
from layerbits.checkpoint.labels import label_of
from layerbits.checkpoint.sizes import scored_model
from layerbits.checkpoint.times import fits, times_of
from layerbits.results.assignment import Assignment
from layerbits.schemes.cost_table import FILE, CostTable
from layerbits.schemes.source import Source
from layerbits.serving.costs import CostRequest, measure_costs, time_steps, without_weights
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, Refused
from layerbits.serving.stand_in import write_stand_in
from layerbits.serving.unscored import unscored

ROOT = Path(__file__).parents[1]
CANDIDATES = "wfp8_afp8,wint8_aint8/recipe_match_channel_token,wint4_afp16/w_group128"
CLASSES = {"qwen3_vl_4b": "Qwen3VLForConditionalGeneration", "qwen2_5_vl_3b": "Qwen2_5_VLForConditionalGeneration"}


def config_folder(name: str, folder: Path) -> Path:
    """A folder with the config of a model, and nothing else."""
    config = getattr(shapes, name)()
    if name in CLASSES:
        config.architectures = [CLASSES[name]]
    config.save_pretrained(folder)
    return folder


def drawn(source: Source, runs: list[str], count: int) -> list[Assignment]:
    """The unquantized model, and assignments of candidates to groups at random, each with shares of its own."""
    rng = np.random.default_rng(0)
    names = [None, *runs]
    made = [Assignment([None] * len(source.groups))]
    for _ in range(count):
        shares = rng.dirichlet(np.ones(len(names)))
        made.append(Assignment([names[i] for i in rng.choice(len(names), len(source.groups), p=shares)]))
    return made


def main() -> None:
    """Measures the table and the schemes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a function of shapes.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--candidates", default="wfp8_afp8,wint8_aint8/recipe_match_channel_token,wint4_afp16/w_group128"
    )
    parser.add_argument("--schemes", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prefill", default="512")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--python", help="a Python that has vLLM")
    parser.add_argument("--arguments", default="", help="further arguments of the engine")
    given = parser.parse_args()

    asked = CostRequest.of(given.batches, given.prefill, given.repeats)
    launch = Launch(find_environment(given.python, ROOT), arguments=tuple(shlex.split(given.arguments)))
    given.out.mkdir(parents=True, exist_ok=True)
    source = unscored(str(config_folder(given.model, given.out / given.model)), given.candidates.split(","))
    resolved, _, linears = scored_model(source, "a benchmark")
    file = given.out / FILE
    table = CostTable.load(file) if file.exists() else measure_costs(source, asked, launch, given.out / "work")
    table.save(file)

    labels = {info.name: label_of(info, COMPRESSED) for info in source.candidates}
    runs = [name for name, label in labels.items() if (COMPRESSED, label.algo) in table.layouts]
    launch = replace(launch, dtype=table.dtype, arguments=(*without_weights(resolved), *launch.arguments))
    rows = []
    print("| scheme | step | predicted ms | measured ms | predicted / measured |\n|---|---|---:|---:|---:|")
    for number, assignment in enumerate(drawn(source, runs, given.schemes)):
        stored = {
            module: labels[name]
            for group, name in zip(source.groups, assignment, strict=True)
            if name is not None and all(fits(labels[name], linears[m][0]) for m in group.modules)
            for module in group.modules
        }
        assignment = Assignment(
            name if group.modules[0] in stored else None for group, name in zip(source.groups, assignment, strict=True)
        )
        name = f"scheme-{number}" if number else "unquantized"
        blocks = resolved.config.get_text_config().num_hidden_layers
        folder = write_stand_in(given.out / "work" / name, resolved, table.dtype, blocks, stored)
        try:
            steps = time_steps(folder, asked, launch, given.out / "work")
        except Refused as words:
            print(f"| {name} | vLLM does not run it: {words} | | | |", flush=True)
            continue
        for step, seconds in steps:
            times = times_of(linears, source, step, table)
            times = replace(times, formats={COMPRESSED: times.formats[COMPRESSED]})
            predicted, measured = times.seconds(assignment), statistics.median(seconds)
            rows.append({
                "scheme": name, "step": step.name, "predicted": predicted, "measured": list(seconds),
                "groups": {str(n): assignment.count(n) for n in (None, *runs)},
            })  # fmt: skip
            print(
                f"| {name} | {step.name} | {1000 * predicted:.3f} | {1000 * measured:.3f} "
                f"({1000 * min(seconds):.3f} to {1000 * max(seconds):.3f}) | {predicted / measured:.3f} |",
                flush=True,
            )
        write_json(given.out / "predicted_steps.json", {"model": given.model, "where": table.where, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
