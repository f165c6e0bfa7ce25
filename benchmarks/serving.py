"""How well `diverges` tells corrupted checkpoints from good ones, with a real vLLM.

    python benchmarks/serving.py prepare WORK EXPORT ...     # texts, mixtures, corrupted copies; what to serve
    python benchmarks/serving.py compare WORK CHECKPOINT ... # after it: a line per checkpoint, and a record
    python benchmarks/serving.py table RECORD                # it as tables

EXPORT is a checkpoint of `-e export` or of benchmarks/uniform.py, all of one model and calibration. A mixture takes
each group of linears that runtimes fuse from one of the exports named by `--mix`, or unquantized; the draw is its seed.
A corrupted copy is what vLLM gets, as if it had read a number wrongly, while PyTorch computes the files that it is a
copy of: files that were changed since their proof are found by their digest. `compare` may be called while vLLM works.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from layerbits.checkpoint.labels import read_quantization  # noqa: E402
from layerbits.checkpoint.reader import open_checkpoint  # noqa: E402
from layerbits.checkpoint.restore import restore  # noqa: E402
from layerbits.probing.loading import Prepared, prepare  # noqa: E402
from layerbits.serving.check import RuntimeOutput, compare, read_scheme  # noqa: E402
from layerbits.serving.distributions import Distributions, select  # noqa: E402
from layerbits.serving.gain_score_test import gain_scores  # noqa: E402
from layerbits.serving.reference import Plain, Reference, Whole, logprobs, replicas, rounding  # noqa: E402
from layerbits.serving.texts import Texts, held_out_texts  # noqa: E402
from layerbits.serving.verdict import BOUND  # noqa: E402

TOKENS, TOP_K, DTYPE = 1000, 1000, "bfloat16"
SCALE = "weight_scale"
WEIGHTS = ("weight", "weight_packed")
PARTS = (*WEIGHTS, "weight_shape", SCALE, "weight_scale_2", "input_scale")
LINEARS = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
FUSED = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])
Tensors = dict[str, torch.Tensor]


class NotHere(Exception):
    """This checkpoint cannot be corrupted in this way."""


def mixture(work: Path, seed: int, exports: list[Path], source: Path) -> Path:
    """A checkpoint whose groups of linears come from several exports; how many from each is drawn, too."""
    draw = random.Random(seed)
    target = work / "mixed" / f"mix-{seed}"
    if target.exists():
        return target
    parts = [load_file(export / "model.safetensors") for export in exports]
    plain = load_file(source / "model.safetensors")
    weights = [draw.random() for _ in (*exports, source)]
    blocks = sorted({n.rsplit(".", 3)[0] for n in plain if ".self_attn." in n})
    tensors = {n: t for n, t in plain.items() if n in parts[0] and not n.endswith("_proj.weight")}
    groups: list[list[str]] = [[] for _ in exports]
    ignore = ["lm_head"]
    for block in blocks:
        for family in FUSED:
            (chosen,) = draw.choices(range(len(weights)), weights)
            modules = [f"{block}.{linear}" for linear in family]
            (groups[chosen] if chosen < len(exports) else ignore).extend(modules)
            for module in modules:
                if chosen == len(exports):
                    tensors[f"{module}.weight"] = plain[f"{module}.weight"]
                else:
                    tensors |= {n: parts[chosen][n] for n in names_of(parts[chosen], module)}
    shutil.copytree(exports[0], target, ignore=shutil.ignore_patterns("model.safetensors", "layerbits.json", ".*"))
    configs = [json.loads((export / "config.json").read_text()) for export in exports]
    config, quantization = configs[0], configs[0]["quantization_config"]
    quantization["config_groups"] = {
        f"group_{i}": {**c["quantization_config"]["config_groups"]["group_0"], "targets": names}
        for i, (c, names) in enumerate(zip(configs, groups, strict=True))
        if names
    }
    quantization |= {"ignore": ignore, "format": "mixed-precision"}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def names_of(tensors: Tensors, module: str) -> list[str]:
    """Names of the tensors of a linear."""
    return [name for part in PARTS if (name := f"{module}.{part}") in tensors]


def drawn(tensors: Tensors, draw: random.Random, wanted: str, linears: tuple[str, ...] = LINEARS) -> str:
    """A linear that has some tensor."""
    found = sorted(n for n in tensors if n.endswith(tuple(f"{linear}.{wanted}" for linear in linears)))
    if not found:
        raise NotHere
    return draw.choice(found).removesuffix(f".{wanted}")


def short(module: str) -> str:
    """A module without the beginning that all have."""
    return module.removeprefix("model.layers.")


def wrong_scale(factor: float):
    def change(tensors: Tensors, draw: random.Random) -> str:
        module = drawn(tensors, draw, SCALE)
        name = f"{module}.{SCALE}"
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        return f"{short(module)}: scale x {factor:g}"

    return change


def swapped(first: str, second: str):
    def change(tensors: Tensors, draw: random.Random) -> str:
        module = drawn(tensors, draw, SCALE, (first,))
        other = module.removesuffix(first) + second
        for name in names_of(tensors, module):
            twin = other + name.removeprefix(module)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
        return f"{short(module)} and {second} swapped"

    return change


def transposed(tensors: Tensors, draw: random.Random) -> str:
    """A square weight, transposed."""
    module = drawn(
        {n: t for n, t in tensors.items() if t.dtype == torch.int8}, draw, "weight", (LINEARS[0], LINEARS[3])
    )
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].t().contiguous()
    return f"{short(module)} transposed"


def of_another_block(tensors: Tensors, draw: random.Random) -> str:
    """All tensors of a linear, from the same linear of another block."""
    module = drawn(tensors, draw, SCALE)
    linear = ".".join(module.rsplit(".", 2)[1:])
    shapes = {n.removeprefix(module): tensors[n].shape for n in names_of(tensors, module)}
    others = {n.removesuffix(f".{SCALE}") for n in tensors if n.endswith(f"{linear}.{SCALE}")} - {module}
    same = [o for o in sorted(others) if {n.removeprefix(o): tensors[n].shape for n in names_of(tensors, o)} == shapes]
    if not same:
        raise NotHere
    other = draw.choice(same)
    tensors |= {module + part: tensors[other + part] for part in shapes}
    return f"{short(module)}: from {short(other)}"


def of_another_model(tensors: Tensors, draw: random.Random) -> str:
    """The weight and scales of a linear as another model has them: one that was initialized and never trained."""
    module = drawn(tensors, draw, SCALE)
    name = next(n for n in names_of(tensors, module) if n.endswith(WEIGHTS))
    scale, generator = tensors[f"{module}.{SCALE}"], torch.Generator().manual_seed(draw.randrange(1 << 30))
    packed = name.endswith("_packed")
    rows, columns = tensors[name].shape
    weight = 0.02 * torch.randn(rows, columns * (8 if packed else 1), generator=generator)
    blocks = weight.reshape(rows, scale.shape[1], -1)
    largest = 7 if packed else 127
    new = (blocks.abs().amax(-1) / largest).to(scale.dtype)
    values = (blocks / new.float()[..., None]).round().clamp(-largest, largest).reshape(rows, -1).to(torch.int64)
    if packed:
        nibbles = (values + 8).reshape(rows, -1, 8) << torch.arange(0, 32, 4)
        values = nibbles.sum(-1)
        values = torch.where(values >= 1 << 31, values - (1 << 32), values)
    tensors[name], tensors[f"{module}.{SCALE}"] = values.to(tensors[name].dtype), new
    return f"{short(module)}: of another model"


def half_lost(tensors: Tensors, draw: random.Random) -> str:
    """The second half of a linear's rows is zero, as of a shard that was never loaded."""
    module = drawn(tensors, draw, SCALE)
    scale = tensors[f"{module}.{SCALE}"].clone()
    scale[len(scale) // 2 :] = 0
    tensors[f"{module}.{SCALE}"] = scale
    return f"{short(module)}: half of its rows zero"


KINDS = {
    "scale2": wrong_scale(2.0),
    "scale1.25": wrong_scale(1.25),
    "scale1.05": wrong_scale(1.05),
    "scale1.02": wrong_scale(1.02),
    "kv-swapped": swapped("self_attn.k_proj", "self_attn.v_proj"),
    "gate-up-swapped": swapped("mlp.gate_proj", "mlp.up_proj"),
    "transposed": transposed,
    "other-model": of_another_model,
    "other-block": of_another_block,
    "half-lost": half_lost,
}


def corrupt(work: Path, checkpoint: Path) -> list[Path]:
    """Copies of a checkpoint, each corrupted in one way in one linear that is drawn."""
    copies = []
    for kind, change in KINDS.items():
        target = work / "corrupted" / f"{checkpoint.name}--{kind}"
        if not target.exists():
            tensors = load_file(checkpoint / "model.safetensors")
            try:
                what = change(tensors, random.Random(target.name))
            except NotHere:
                continue
            shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("model.safetensors"))
            save_file(
                {n: t.contiguous().clone() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
            )
            (target / "corruption.txt").write_text(what)
        copies.append(target)
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


def prepare_all(work: Path, exports: list[Path], mix: set[str], seeds: int, plenty: set[str]) -> None:
    """Writes what is to be served."""
    work.mkdir(parents=True, exist_ok=True)
    prepared = prepare(read_scheme(exports[0]))
    (work / "rows.json").write_text(json.dumps(texts_of(prepared).rows))
    source = work / "unquantized"
    if not source.exists():
        source.symlink_to(prepared.resolved.source)
    sources = [export for export in exports if export.name in mix]
    mixed = [mixture(work, seed, sources, source) for seed in range(1, seeds + 1)]
    copies = [copy for made in (*exports, *mixed) if made.name in plenty for copy in corrupt(work, made)]
    print("serve with:\n", "benchmarks/serving_runtime.py", work, source, *exports, *mixed, *copies)


def plain_of(prepared: Prepared, texts: Texts, kept: Path) -> Plain:
    """The unquantized model in PyTorch."""
    if not kept.exists():
        model = prepared.load("cpu").model.float()
        with rounding(model, DTYPE):
            rounded = logprobs(model, texts.batches).logprobs
        torch.save((logprobs(model, texts.batches).logprobs, rounded), kept)
    return Plain(*(Whole(x) for x in torch.load(kept)))


def reference_of(checkpoint: Path, texts: Texts, plain: Plain, kept: Path) -> Reference:
    """What PyTorch computes of the files; nothing was scored."""
    opened = open_checkpoint(checkpoint)
    model = restore(opened, read_quantization(opened), "cpu").float()
    if not kept.exists():
        exact = logprobs(model, texts.batches)
        torch.save([x.logprobs for x in (exact, *replicas(model, texts.batches, DTYPE))], kept)
    exact, rounded, expected = (Whole(x) for x in torch.load(kept))
    return Reference(plain, exact, exact, rounded, expected, None, lambda e, d: gain_scores(model, texts.batches, e, d))


def compare_all(work: Path, checkpoints: list[Path], chosen_on: set[str], out: Path | None) -> None:
    """Judges everything that was served so far; what is in the record already is left alone."""
    first = prepare(read_scheme(checkpoints[0]))
    texts = texts_of(first)
    kept = work / "pytorch"
    kept.mkdir(exist_ok=True)
    plain = plain_of(first, texts, kept / "unquantized.pt")
    told = RuntimeOutput(read_told(work / "told" / "unquantized.npz", texts), (), {})
    out = out or work / "record.json"
    found: list[dict[str, Any]] = json.loads(out.read_text())["checkpoints"] if out.exists() else []
    done = {record["name"] for record in found}
    for checkpoint in checkpoints:
        names = [file.stem for file in sorted((work / "told").glob("*.npz"))]
        mine = [name for name in names if name.split("--")[0] == checkpoint.name and name not in done]
        if not mine:
            continue
        pytorch = reference_of(checkpoint, texts, plain, kept / f"{checkpoint.name}.pt")
        for name in mine:
            served = RuntimeOutput(read_told(work / "told" / f"{name}.npz", texts), (), {})
            measured = compare(pytorch, told, served, texts, TOP_K)
            note = work / "corrupted" / name / "corruption.txt"
            found.append(
                {
                    "name": name,
                    "corruption": note.read_text() if note.exists() else None,
                    "set": "development" if name in chosen_on else "fresh",
                    "diverges": measured.diverges,
                    "ratio": round(measured.ratio, 4),
                    "gain": {
                        **asdict(measured.gain),
                        "t": round(measured.gain.t, 3),
                        "off": round(measured.gain.off, 4),
                    },
                    "t_allowed": round(measured.gain.allowed, 3),
                    "other_damage": measured.other_damage,
                    **{
                        k: round(getattr(measured, k).kl, 6)
                        for k in ("served_damage", "restored_damage", "rounded_damage", "from_restored")
                    },
                    **{k: round(getattr(measured, k).kl, 6) for k in ("noise", "rounding", "rounding_noise")},
                }
            )
            print(f"{name:58} {found[-1]['corruption'] or '':48} {measured.sentence}", flush=True)
            out.write_text(json.dumps({"tokens": texts.tokens, "top_k": TOP_K, "checkpoints": found}, indent=1) + "\n")
    for which in ("development", "fresh"):
        print(summary(found, which))


def table(record: Path) -> None:
    """Prints a record as Markdown: the good checkpoints one by one, the corrupted ones by kind and base."""
    found = json.loads(record.read_text())["checkpoints"]
    good = [r for r in found if r["corruption"] is None]
    print(
        "| good checkpoint | ratio | t | damage as served | restored | both rounded |\n|---|---:|---:|---:|---:|---:|"
    )
    for r in good:
        name = (
            f"{r['name']}{' (chosen on)' if r['set'] == 'development' else ''}{' **blamed**' if r['diverges'] else ''}"
        )
        damage = " | ".join(f"{r[f'{k}_damage']:.4f}" for k in ("served", "restored", "rounded"))
        print(f"| {name} | {r['ratio']:.2f} | {r['gain']['t']:.1f} | {damage} |")
    cells = {tuple(r["name"].split("--")): r for r in found if r["corruption"] is not None}
    bases = [r["name"] for r in good if any(base == r["name"] for base, _ in cells)]
    print("\n| what vLLM got | " + " | ".join(bases) + " |\n|---|" + "---|" * len(bases))
    for kind in dict.fromkeys(kind for _, kind in cells):
        row = [_cell(cells.get((base, kind))) for base in bases]
        print(f"| {kind} | " + " | ".join(row) + " |")
    for which in ("development", "fresh"):
        print(f"\n{summary(found, which)}", end="")
    print()


def _cell(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    by = "".join(
        letter
        for letter, yes in zip(
            "RDG",
            (not r["ratio"] <= BOUND, r["other_damage"], not abs(r["gain"]["t"]) <= r["t_allowed"]),
            strict=True,
        )
        if yes
    )
    return f"{r['ratio']:.2f}, {r['gain']['t']:.1f}: {by or '**not found**'}"


def summary(found: list[dict[str, Any]], which: str) -> str:
    """How many of a set were told rightly."""
    good, bad = ([r for r in found if r["set"] == which and (r["corruption"] is None) == is_good] for is_good in (1, 0))
    return (
        f"{which}: of {len(good)} good {sum(r['diverges'] for r in good)} blamed, of {len(bad)} corrupted "
        f"{sum(r['diverges'] for r in bad)} found"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "compare", "table"))
    parser.add_argument("work", type=Path, help="a folder; of `table` a record")
    parser.add_argument("checkpoints", type=Path, nargs="*", help="the first has to be an export")
    parser.add_argument("--mix", default="", help="prepare: names of the exports to mix, separated by commas")
    parser.add_argument("--mixtures", type=int, default=0, help="prepare: how many mixtures")
    parser.add_argument("--corrupt", default="", help="prepare: names of the checkpoints to corrupt")
    parser.add_argument("--chosen-on", default="", help="compare: names of those that the rule was chosen on")
    parser.add_argument("--out", type=Path, help="compare: the record; WORK/record.json")
    a = parser.parse_args()
    split = {key: set(filter(None, getattr(a, key).split(","))) for key in ("mix", "corrupt", "chosen_on")}
    if a.step == "table":
        table(a.work)
    elif a.step == "prepare":
        prepare_all(a.work, a.checkpoints, split["mix"], a.mixtures, split["corrupt"])
    else:
        compare_all(a.work, a.checkpoints, split["chosen_on"], a.out)


if __name__ == "__main__":
    main()
