"""Damage of a trained model with every linear in one layout: as vLLM serves it, and as PyTorch computes it.

    python benchmarks/served_damage.py prepare WORK --overrides "model=hf model.path=QWEN model.name=qwen" --device cuda
    python benchmarks/serving_runtime.py WORK WORK/source WORK/exports/*[!t]   # in vLLM's environment, on the GPU
    python benchmarks/served_damage.py compare WORK --device cuda
    python benchmarks/served_damage.py record WORK --out record.json         # and prints it as a table

`prepare` exports a checkpoint for each layout that is known to load on an H200 (`src/layerbits/data/gpus.json`).
`compare` measures what `serve_check` does, on the same rows. Several processes may do either job at once: each takes
the checkpoints whose number has its share, `--share 0/4`. A row agrees where the damage as served is within 10% of
that of the files when PyTorch rounds as the runtime does, or no farther from it than the runtime's noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from layouts import ROOT
from serving import read_told
from uniform import compose, prepared, scheme_of

from layerbits.atomic import write_json
from layerbits.checkpoint.gpus import DATA
from layerbits.checkpoint.label import FORMATS
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.errors import UserError
from layerbits.export.plan import plan_export, source_folder
from layerbits.export.scheme import export_scheme
from layerbits.plain import finite_object
from layerbits.probing.loading import Prepared, prepare
from layerbits.serving.check import RuntimeOutput, compare, read_scheme
from layerbits.serving.reference import Plain, reference
from layerbits.serving.texts import Texts, held_out_texts
from layerbits.stages.workbench import workbench

sys.path.insert(0, str(ROOT))

from tools.docs.damage import table
from tools.docs.exportable import exportable

TOP_K, DTYPE = 1000, "bfloat16"
DAMAGES = ("served_damage", "restored_damage", "rounded_damage", "scored_damage", "scored_damage_whole")
DISTANCES = ("noise", "rounding_noise", "rounding", "from_restored", "from_weights")


def texts_of(ready: Prepared, tokens: int) -> Texts:
    """The held-out rows of a scheme."""
    packing, seq_len, _ = ready.scheme.calibration.row_shape
    return held_out_texts(ready.captions.held_out, ready.tokenizer, packing, seq_len, tokens)


def export_layouts(work: Path, overrides: list[str], device: str, tokens: int, share: tuple[int, int]) -> None:
    """Exports each layout that loads into a folder ``FORMAT--LABEL``, and writes the rows to ask with."""
    loading = {(row["format"], row["label"]) for row in json.loads(DATA.read_text())["layouts"] if row["loads"]}
    bench = workbench(replace(compose(overrides), device=device))
    wanted = {
        (format, label.algo): row.candidate
        for row in exportable()
        for format in FORMATS
        if (label := row.labels[format]) is not None and (format, label.algo) in loading
    }
    work.mkdir(parents=True, exist_ok=True)
    for number, ((format, label), candidate) in enumerate(sorted(wanted.items())):
        target = work / "exports" / f"{format}--{label}"
        ready = prepared(bench, scheme_of(bench, candidate, target.name))
        if number == 0 and share[0] == 0:
            (work / "rows.json").write_text(json.dumps(texts_of(ready, tokens).rows))
            (work / "source").symlink_to(source_folder(ready.resolved))
        if number % share[1] != share[0] or target.exists():
            continue
        try:
            made = export_scheme(plan_export(ready, target, format=format), device)
        except UserError as error:
            print(f"{target.name}: {error}", flush=True)
            continue
        print(f"{target.name}: {made.proof.summary}", flush=True)


def checkpoints(work: Path) -> list[Path]:
    """The folders that were exported, without their reports."""
    return sorted(file.parent for file in (work / "exports").glob("*/config.json"))


def compare_layouts(work: Path, device: str, tokens: int, share: tuple[int, int]) -> None:
    """Measures each checkpoint that was served; what is measured already is left alone."""
    plain: Plain | None = None
    for number, folder in enumerate(checkpoints(work)):
        told, target = work / "told" / f"{folder.name}.npz", work / "compared" / f"{folder.name}.json"
        if number % share[1] != share[0] or target.exists() or not told.exists():
            continue
        scheme = read_scheme(folder)
        ready = prepare(scheme)
        texts = texts_of(ready, tokens)
        pytorch = reference(ready, open_checkpoint(folder), texts.batches, DTYPE, device, plain)
        plain = pytorch.plain
        unquantized, served = (
            RuntimeOutput(read_told(file, texts), (), {}) for file in (work / "told" / "source.npz", told)
        )
        measured = compare(pytorch, unquantized, served, texts, TOP_K)
        found = {
            "tokens": measured.tokens,
            "candidate": scheme.candidates[0].name,
            "linears_quantized": sum(len(g.modules) for g in scheme.groups),
            "diverges": measured.diverges,
            "sentence": measured.sentence,
            "mass": measured.mass,
            "ratio": measured.ratio,
            "gain": {**asdict(measured.gain), "allowed": measured.gain.allowed},
        }
        target.parent.mkdir(exist_ok=True)
        found |= {key: asdict(getattr(measured, key)) for key in (*DAMAGES, *DISTANCES)}
        write_json(target, finite_object(found))
        print(f"{folder.name}: {measured.sentence}", flush=True)


def record(work: Path, out: Path, model: str, machine: str, runtime: str) -> None:
    """Writes the record of a model, and prints it."""
    rows: list[dict[str, Any]] = []
    for folder in checkpoints(work):
        format, _, label = folder.name.partition("--")
        row: dict[str, Any] = {"format": format, "label": label}
        told, compared = work / "told" / folder.name, work / "compared" / f"{folder.name}.json"
        kernels = told.with_name(f"{folder.name}.kernels.json")
        if kernels.exists():
            names = [kind for kind in json.loads(kernels.read_text()).values() if kind.endswith("Kernel")]
            row["kernels"] = {name: names.count(name) for name in sorted(set(names))}
        if (error := told.with_name(f"{folder.name}.error")).exists():
            row["words"] = error.read_text()[:400]
        elif compared.exists():
            row |= json.loads(compared.read_text())
        rows.append(row)
    about = {"date": date.today().isoformat(), "model": model, "machine": machine, "runtime": runtime}
    write_json(out, {**about, "layouts": rows})
    print(table({**about, "layouts": rows}))


def main() -> None:
    """Does one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("prepare", "compare", "record"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--overrides", default="", help="prepare: of a sensitivity run, separated by spaces")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=3900)
    parser.add_argument("--share", default="0/1", help="NUMBER/COUNT of processes that work side by side")
    parser.add_argument("--out", type=Path, help="record: the file")
    parser.add_argument("--model", default="", help="record: its name")
    parser.add_argument("--machine", default="NVIDIA H200")
    parser.add_argument("--runtime", default="vllm 0.26.0")
    given = parser.parse_args()
    number, _, count = given.share.partition("/")
    share = (int(number), int(count))
    if given.job == "prepare":
        export_layouts(given.work, given.overrides.split(), given.device, given.tokens, share)
    elif given.job == "compare":
        compare_layouts(given.work, given.device, given.tokens, share)
    else:
        record(given.work, given.out, given.model, given.machine, given.runtime)


if __name__ == "__main__":
    main()
