"""What vLLM makes of each layout that an export can have: one tiny checkpoint a label, and vLLM's answer.

    python benchmarks/layouts.py prepare WORK
    PYTHONPATH=tests/serving/vllm_plugin .venv-vllm/bin/python benchmarks/serving_runtime.py WORK WORK/exports/*
    python benchmarks/layouts.py record WORK --served outputs/serve_check_*/serve_check.json ...

`prepare` exports a random Llama of two blocks (256 columns, so that groups of 128 fit) under every candidate of
docs/export.md's table, once for each label. Without the plugin on its path, vLLM says which operators its CPU build
lacks. `record` writes what vLLM said, and the KL divergences of serve checks on a trained model, into the file that
the table is made of.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from uniform import compose, prepared, scheme_of

from layerbits.atomic import write_json
from layerbits.checkpoint.label import FORMATS
from layerbits.errors import UserError
from layerbits.export.plan import plan_export
from layerbits.export.scheme import export_scheme
from layerbits.serving.server import last_error
from layerbits.stages.workbench import workbench

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.docs.exportable import exportable  # noqa: E402 - of the project, which is no package

DATA = ROOT / "tools" / "docs" / "served.json"
WORDS, ROWS, TOKENS = 1024, 2, 32


def tiny(folder: Path) -> None:
    """Saves a random model with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    captions = (Path(__file__).parents[1] / "src/layerbits/data/everyday_captions.txt").read_text().split()
    words = ["<unk>", "</s>", *dict.fromkeys(captions)][:WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def prepare(work: Path) -> None:
    """Exports each label once, into a folder ``FORMAT--LABEL``."""
    source = work / "source"
    if not source.exists():
        tiny(source)
    (work / "rows.json").write_text(json.dumps([[3 + i + j for j in range(TOKENS)] for i in range(ROWS)]))
    overrides = ["model=hf", f"model.path={source}", "model.name=tiny", "device=cpu"]
    bench = workbench(replace(compose(overrides), device="cpu"))
    for row in exportable():
        for format in FORMATS:
            label = row.labels[format]
            target = work / "exports" / f"{format}--{label.algo}" if label else None
            if target is None or target.exists():
                continue
            ready = prepared(bench, scheme_of(bench, row.candidate, target.name))
            try:
                made = export_scheme(plan_export(ready, target, format=format), "cpu")
            except UserError as error:
                print(f"{target.name}: {error}", flush=True)
                continue
            print(made.proof.summary, flush=True)


def asked(work: Path) -> dict[str, dict[str, Any]]:
    """What vLLM said, by format and label."""
    answers: dict[str, dict[str, Any]] = {format: {} for format in FORMATS}
    for folder in sorted((work / "exports").iterdir()):
        format, _, label = folder.name.partition("--")
        told = work / "told" / folder.name
        if told.with_name(f"{told.name}.npz").exists():
            answers[format][label] = {"loads": True}
        elif (error := told.with_name(f"{told.name}.error")).exists():
            answers[format][label] = {"loads": False, "words": last_error(error)}
    return answers


def damage(check: dict[str, Any]) -> tuple[str, str, dict[str, float | str]]:
    """Format, label and KL divergences of the serve check of a checkpoint with one label."""
    record = json.loads((Path(check["folder"]) / "layerbits.json").read_text())
    (label,) = record["record"]["labels"]
    measured = check["measured"]
    names = {
        "served": "served_damage",
        "restored": "restored_damage",
        "scored": "scored_damage",
        "probed": "scored_damage_whole",
        "noise": "noise",
    }
    kl = {name: float(f"{measured[key]['kl']:.4g}") for name, key in names.items()}
    (candidate,) = record["scheme"]["candidates"]
    about = {"config_hash": candidate["config_hash"], "se": float(f"{measured['served_damage']['se']:.2g}")}
    return record["record"]["format"], label, {**about, **kl}


def main() -> None:
    """Prepares or records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("prepare", "record"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--plain", type=Path, help="WORK of a run without the plugin, to tell which layouts need it")
    parser.add_argument("--served", type=Path, nargs="*", default=[], help="serve_check.json of checks")
    arguments = parser.parse_args()
    if arguments.job == "prepare":
        prepare(arguments.work)
        return
    data = json.loads(DATA.read_text())
    answers = asked(arguments.work)
    without = asked(arguments.plain) if arguments.plain else {}
    for format, labels in answers.items():
        for label, answer in labels.items():
            before = without.get(format, {}).get(label, answer)
            answer["plugin"] = answer["loads"] and not before["loads"]
        data["asked"].setdefault(format, {}).update(labels)
    for check in (json.loads(file.read_text()) for file in arguments.served):
        if check["measured"] is not None:
            format, label, kl = damage(check)
            data["served"].setdefault(format, {})[label] = kl
    write_json(DATA, data)


if __name__ == "__main__":
    sys.exit(main())
