"""The main job around the engines, on a model of real shape: seconds per phase, and what our run adds.

    python benchmarks/main_job.py --shape qwen3-vl-4b --steps 16 --out record.json
    python benchmarks/main_job.py --shape tiny --steps 1 --length 64 --pairs wint8_afp16 --engines onepass

Makes a checkpoint folder (config and a word tokenizer, random weights) and a caption file that fill ``steps`` batches,
then runs ``experiments/sensitivity.py -m`` once per engine, and ``experiments/grid.py``, into a SQLite store.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from one_pass import SIX
from shapes import SHAPES, class_name

from layerbits.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
_WORDS, _TOKENS_PER_CAPTION = 5000, 13


def inputs(folder: Path, shape: str, steps: int, rows: int, length: int, used: int = _WORDS) -> int:
    """Writes the checkpoint folder and captions of the first ``used`` words; returns how many fill the batches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = SHAPES[shape]()
    config.architectures = [class_name(config)]
    if shape.startswith("tiny"):
        config.vocab_size = _WORDS + 2
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(_WORDS)} | {"<eos>": _WORDS, "<unk>": _WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    captions = -(-steps * rows * length // _TOKENS_PER_CAPTION)
    source = random.Random(0)
    lines = [
        " ".join(f"w{source.randrange(used)}" for _ in range(_TOKENS_PER_CAPTION - 1)) for _ in range(captions + 16)
    ]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return captions


def run(script: str, folder: Path, arguments: list[str]) -> float:
    """Runs an entry script into the folder's store; returns its wall seconds."""
    command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
    environment = {**os.environ, "LAYERBITS_CACHE": str(folder / f"cache-{time.monotonic_ns()}")}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return time.perf_counter() - start


def manifests(folder: Path) -> list[dict[str, Any]]:
    """Per run: pair, phases, peak memory, and the seconds from its start to its end in the store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    rows = []
    for found in client.search_runs(experiments, "tags.outcome = 'ok'", order_by=["attributes.start_time"]):
        data = found.data
        if "eff.quant_pair" not in data.params:
            continue
        row = {"pair": data.params["eff.quant_pair"], "engine": data.params["eff.engine"]}
        row["run"] = (found.info.end_time - found.info.start_time) / 1000
        row |= {k: v for k, v in data.metrics.items() if k.startswith(("seconds/", "memory/"))}
        row["kl"] = data.metrics["summary/predicted_kl_sum"]
        row["tags"] = {k: data.tags.get(k) for k in ("memory_mode", "fp4_numerics", "gpu.name", "pass_candidates")}
        rows.append(row)
    return rows


def main() -> None:
    """Runs the engines and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-vl-4b")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", default=",".join(SIX))
    parser.add_argument("--engines", default="stock,onepass,grid")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"provenance": provenance(ROOT)}
    for engine in arguments.engines.split(","):
        folder = Path(tempfile.mkdtemp())
        captions = inputs(folder, arguments.shape, arguments.steps, arguments.rows, arguments.length)
        common = [
            "model=hf", f"model.path={folder}", f"model.name={arguments.shape}", "model.random_weights=true",
            "model.dtype=" + ("float32" if arguments.shape.startswith("tiny") else "bfloat16"),
            "dataset=text_file", f"dataset.path={folder}/captions.txt", f"autoquant.batch_size={arguments.rows}",
            f"autoquant.seq_len={arguments.length}", f"output_root={folder}/out",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
        ]  # fmt: skip
        if engine == "grid":
            seconds = run("grid.py", folder, [*common, f"quant_pairs={arguments.pairs}", f"dataset_sizes={captions}"])
        else:
            wanted = [f"autoquant.engine={engine}", f"quant_pair={arguments.pairs}", f"dataset.size={captions}"]
            seconds = run("sensitivity.py", folder, ["-m", *common, *wanted])
        record[engine] = {"process_seconds": seconds, "runs": manifests(folder)}
        print(f"\n{engine}: {seconds:.1f} s for the whole process")
        for row in record[engine]["runs"]:
            shown = {k.removeprefix("seconds/"): round(v, 3) for k, v in row.items() if isinstance(v, float)}
            print(f"{row['pair']:12s} {shown} {row['tags']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
