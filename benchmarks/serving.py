"""How well `diverges` tells corrupted checkpoints from good ones, with a real vLLM.

    python benchmarks/serving.py prepare WORK EXPORT ...        # texts, corrupted copies, and the command to serve all
    python benchmarks/serving.py compare WORK EXPORT ...        # after it: a line per checkpoint, and a summary

EXPORT is a checkpoint of `-e export` or of benchmarks/uniform.py, all of one model and calibration. A corrupted copy is
what vLLM gets; PyTorch computes the export that was proven: as if the runtime had read a number wrongly. Files that
were changed since their proof are found by their digest. `compare` may be called while vLLM still works.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from layerbits.checkpoint.labels import read_quantization  # noqa: E402
from layerbits.checkpoint.reader import open_checkpoint  # noqa: E402
from layerbits.checkpoint.restore import restore  # noqa: E402
from layerbits.probing.apply import apply_scheme, find_ranges  # noqa: E402
from layerbits.probing.loading import Prepared, prepare  # noqa: E402
from layerbits.serving.check import read_scheme  # noqa: E402
from layerbits.serving.distributions import Distributions, select, shared  # noqa: E402
from layerbits.serving.reference import Whole, _logprobs, _rounding  # noqa: E402
from layerbits.serving.texts import Texts, held_out_texts  # noqa: E402
from layerbits.serving.verdict import BOUND  # noqa: E402

TOKENS = 1000
SCALE, PARTS = "weight_scale", ("weight", "weight_packed", "weight_scale", "weight_scale_2", "input_scale")
Tensors = dict[str, torch.Tensor]


def parts_of(tensors: Tensors, module: str) -> list[str]:
    """Names of the tensors of a quantized linear, without the module."""
    return [part for part in PARTS if f"{module}.{part}" in tensors]


def wrong_scale(factor: float):
    def change(tensors: Tensors, block: str, kind: str) -> str:
        name = f"{block}.{kind}.{SCALE}"
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        return f"{kind}: {SCALE} x {factor:g}"

    return change


def swapped(first: str, second: str):
    def change(tensors: Tensors, block: str, _kind: str) -> str:
        for part in parts_of(tensors, f"{block}.{first}"):
            a, b = f"{block}.{first}.{part}", f"{block}.{second}.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]
        return f"{first} and {second} swapped"

    return change


def transposed(tensors: Tensors, block: str, _kind: str) -> str:
    """A square weight, transposed."""
    name = f"{block}.self_attn.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    return "o_proj transposed"


def of_another(tensors: Tensors, block: str, kind: str) -> str:
    """A tensor of the same shape from elsewhere: random values with the statistics of the right one."""
    name = next(n for n in (f"{block}.{kind}.weight", f"{block}.{kind}.weight_packed") if n in tensors)
    values = tensors[name].flatten()
    tensors[name] = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))].view(
        tensors[name].shape
    )
    return f"{kind}: the weight of another model"


KINDS = {
    "scale2": wrong_scale(2.0),
    "scale1.25": wrong_scale(1.25),
    "scale1.05": wrong_scale(1.05),
    "kv-swapped": swapped("self_attn.k_proj", "self_attn.v_proj"),
    "gate-up-swapped": swapped("mlp.gate_proj", "mlp.up_proj"),
    "transposed": transposed,
    "another": of_another,
}
LINEARS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def corrupt(work: Path, export: Path) -> list[Path]:
    """Copies of an export, each corrupted in one way in one block that is drawn."""
    copies = []
    for kind, change in KINDS.items():
        target = work / "corrupted" / f"{export.name}--{kind}"
        copies.append(target)
        if target.exists():
            continue
        tensors = load_file(export / "model.safetensors")
        draw = random.Random(target.name)
        quantized = sorted({n.rsplit(".", 1)[0] for n in tensors if n.endswith(f".{SCALE}")})
        blocks = sorted({m.rsplit(".", 2)[0] for m in quantized})
        block, linear = draw.choice(blocks), draw.choice(LINEARS)
        if f"{block}.{linear}" not in quantized:
            linear = draw.choice([m.removeprefix(f"{block}.") for m in quantized if m.startswith(f"{block}.")])
        try:
            what = change(tensors, block, linear)
        except KeyError:  # the format packs it, or the scheme leaves one of them alone
            copies.pop()
            continue
        shutil.copytree(export, target, ignore=shutil.ignore_patterns("model.safetensors"))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "corruption.txt").write_text(f"{block.rsplit('.', 1)[1]}.{what}")
    return copies


def texts_of(prepared: Prepared) -> Texts:
    """The held-out texts."""
    packing, seq_len, _ = prepared.scheme.calibration.row_shape
    return held_out_texts(prepared.captions.held_out, prepared.tokenizer, packing, seq_len, TOKENS)


def read_told(file: Path, texts: Texts) -> Distributions:
    """What benchmarks/serving_runtime.py wrote."""
    told = np.load(file)
    rows = []
    for number, text in enumerate(texts.rows):
        mine = told["row"] == number
        events = told["position"][mine] * (1 << 32) + told["token"][mine]
        own = np.searchsorted(events, [p * (1 << 32) + token for p, token in enumerate(text[1:])])
        values = told["logprob"][mine]
        rows.append(Distributions(len(text) - 1, events, values, values[own]))
    return select(rows, texts.wanted)


def prepare_all(work: Path, exports: list[Path], plenty: set[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    prepared = prepare(read_scheme(exports[0]))
    (work / "rows.json").write_text(json.dumps(texts_of(prepared).rows))
    source = work / "unquantized"
    if not source.exists():
        source.symlink_to(prepared.resolved.source)
    copies = [copy for export in exports if export.name in plenty for copy in corrupt(work, export)]
    print("serve with:\n", "benchmarks/serving_runtime.py", work, source, *exports, *copies)


def compare_all(work: Path, exports: list[Path]) -> None:
    first = prepare(read_scheme(exports[0]))
    texts = texts_of(first)
    served = sorted((work / "told").glob("*.npz"))
    kept = work / "pytorch"
    kept.mkdir(exist_ok=True)
    model = None
    found = []
    plain = read_told(work / "told" / "unquantized.npz", texts)
    for export in exports:
        mine = [file for file in served if file.stem.split("--")[0] == export.name]
        if not mine:
            continue
        cache = kept / f"{export.name}.pt"
        if not cache.exists():
            model = model or first.load("cpu").model.float()
            unquantized = kept / "unquantized.pt"
            if not unquantized.exists():
                with _rounding(model, "bfloat16"):
                    rounded = _logprobs(model, texts.batches).logprobs
                torch.save((_logprobs(model, texts.batches).logprobs, rounded), unquantized)
            scheme = read_scheme(export)
            with apply_scheme(model, scheme, find_ranges(model, [scheme], first.calibration)):
                scored = _logprobs(model, texts.batches).logprobs
                with _rounding(model, "bfloat16"):
                    torch.save((scored, _logprobs(model, texts.batches).logprobs), cache)
        files = kept / f"{export.name}.restored.pt"
        if not files.exists():
            checkpoint = open_checkpoint(export)
            restored = restore(checkpoint, read_quantization(checkpoint), "cpu").float()
            torch.save(_logprobs(restored, texts.batches).logprobs, files)
        u, _ = (Whole(x) for x in torch.load(kept / "unquantized.pt"))
        s, b = (Whole(x) for x in torch.load(cache))
        f = Whole(torch.load(files))
        for file in mine:
            told = read_told(file, texts)
            events = shared(told, plain)
            p, q, r, v, w = u.at(events), s.at(events), b.at(events), told.at(events.events), plain.at(events.events)
            explained = events.kl(q, r).mean() + events.kl(p, w).mean()
            x = f.at(events)
            away = events.kl(x, v).mean()
            note = work / "corrupted" / file.stem / "corruption.txt"
            record = {
                "name": file.stem,
                "corruption": note.read_text() if note.exists() else "",
                "noise": events.kl(p, w).mean(),
                "explained": explained,
                "from_restored": away,
                "from_scored": events.kl(q, v).mean(),
                "ratio": away / explained,
                "served": events.kl(w, v).mean(),
                "restored": events.kl(p, x).mean(),
                "scored": events.kl(p, q).mean(),
                "whole": u.kl(s).mean(),
                "tokens": texts.tokens,
            }
            found.append(record)
            print(
                f"{record['name']:60} {record['corruption']:45} ratio {record['ratio']:8.3f}  served "
                f"{record['served']:.4g} restored {record['restored']:.4g} scored {record['scored']:.4g} whole "
                f"{record['whole']:.4g}",
                flush=True,
            )
    (work / "ratios.json").write_text(json.dumps(found, indent=1))
    good = [r["ratio"] for r in found if "--" not in r["name"]]
    bad = [r["ratio"] for r in found if "--" in r["name"]]
    print(f"{len(good)} good: ratio {min(good):.3f} to {max(good):.3f}, {sum(g > BOUND for g in good)} blamed")
    if bad:
        print(f"{len(bad)} corrupted: ratio {min(bad):.3f} to {max(bad):.3f}, {sum(x > BOUND for x in bad)} found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "compare"))
    parser.add_argument("work", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--corrupt", default="", help="names of the exports to corrupt, separated by commas")
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare_all(arguments.work, arguments.exports, set(arguments.corrupt.split(",")))
    else:
        compare_all(arguments.work, arguments.exports)


if __name__ == "__main__":
    main()
