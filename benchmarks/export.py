"""Schemes the whole way on a model of real shape: score, three schemes, export, proof, probe, in seconds and memory.

    python benchmarks/export.py --shape qwen2.5-vl-3b --out record.json
    python benchmarks/export.py --shape tiny --steps 2 --length 64 --probe-rows 8 --out record.json

Makes a checkpoint with random weights and a word tokenizer, scores FP8 with ``experiments/sensitivity.py``, then makes,
exports, proves and probes the schemes of ``configs/scheme`` in this process. Memory is sampled per phase: of the host
every 5 ms, of the GPU PyTorch's own peak. The record is written anew after every step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from main_job import ROOT, inputs, run
from shapes import SHAPES

from layerbits.checkpoint.reader import open_checkpoint
from layerbits.export import scheme as export
from layerbits.export.plan import plan_exports
from layerbits.history.scheme_inputs import load_scores
from layerbits.inputs.models import build
from layerbits.probing.probe import probe_schemes
from layerbits.probing.report import markdown
from layerbits.provenance import provenance
from layerbits.schemes.catalog import load_specs
from layerbits.schemes.kv_cache import with_cache
from layerbits.schemes.make import make_schemes

SCHEMES = ("fp8_autoquant_top25", "fp8_autoquant_top50", "fp8_autoquant_full")
_EVERY = 0.005
_MORE_CAPTIONS, _USED = 1024, 200


class Memory:
    """Peak memory of phases: bytes of this process and of the GPU's tensors, at the start and at most."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._process = psutil.Process()
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @contextmanager
    def timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        """What ``layerbits.export.scheme`` measures a phase with, and memory beside it."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed earlier would be used again unseen
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        record = {"host_start": float(self._process.memory_info().rss)}
        record["gpu_start"] = float(torch.cuda.memory_allocated()) if cuda else 0.0
        self._peak = 0
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds[phase] = time.perf_counter() - start
        record["host_peak"] = float(max(self._peak, self._process.memory_info().rss))
        record["gpu_peak"] = float(torch.cuda.max_memory_allocated()) if cuda else 0.0
        self.phases[phase] = record

    def close(self) -> None:
        """Ends the sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_EVERY):
            self._peak = max(self._peak, self._process.memory_info().rss)


def make_source(folder: Path, shape: str, steps: int, rows: int, length: int, device: str) -> int:
    """Writes the checkpoint with its random weights and the captions; returns how many captions fill the batches."""
    from transformers import AutoConfig

    captions = inputs(folder, shape, steps, rows, length, _USED)
    source = random.Random(1)
    with (folder / "captions.txt").open("a") as file:
        for _ in range(_MORE_CAPTIONS):
            file.write(" ".join(f"w{source.randrange(_USED)}" for _ in range(12)) + "\n")
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = build(config, torch.bfloat16)
    with torch.no_grad():  # a model that guesses is refused: this one likes the words that are used
        model.get_input_embeddings().weight += 2
        model.get_output_embeddings().weight[:_USED] += 1 / 16
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()  # for the process that scores
    return captions


def score(folder: Path, shape: str, captions: int, rows: int, length: int) -> Path:
    """Scores FP8; returns the result's folder."""
    run(
        "sensitivity.py",
        folder,
        [
            "model=hf", f"model.path={folder}", f"model.name={shape}", "quant_pair=wfp8_afp8", "dataset=text_file",
            f"dataset.path={folder}/captions.txt", f"dataset.size={captions}", f"autoquant.batch_size={rows}",
            f"autoquant.seq_len={length}", f"output_root={folder}/out", "tracking=none",
        ],
    )  # fmt: skip
    return next((folder / "out").rglob("manifest.json")).parent


def memory_of_read_back(phases: dict[str, dict[str, float]], model: int, device: str) -> dict[str, float]:
    """Bytes above what was there before and, where a model is loaded, above that model."""
    above = {}
    for phase in ("compare", "restore"):
        record, loaded = phases[phase], model if phase == "restore" else 0
        above[f"{phase}_host"] = record["host_peak"] - record["host_start"] - (loaded if device == "cpu" else 0)
        above[f"{phase}_gpu"] = record["gpu_peak"] - record["gpu_start"] - (loaded if device == "cuda" else 0)
    return above


def main() -> None:
    """Goes the whole way and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-3b")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--probe-rows", type=int, default=6)
    parser.add_argument("--kv-cache", default="none")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; a temporary one by default")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    folder = work / "source"
    folder.mkdir()
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("out", "work")},
        "provenance": provenance(ROOT),
        "seconds": {},
        "schemes": {},
    }
    clock = time.perf_counter

    def save(step: str, start: float) -> None:
        record["seconds"][step] = clock() - start
        print(f"{step}: {record['seconds'][step]:.1f} s", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1).replace(str(work), "WORK") + "\n")

    start = clock()
    captions = make_source(folder, arguments.shape, arguments.steps, arguments.rows, arguments.length, device)
    save("make the checkpoint", start)
    start = clock()
    result = score(folder, arguments.shape, captions, arguments.rows, arguments.length)
    save("score", start)
    start = clock()
    specs = load_specs(arguments.schemes.split(","), ROOT / "configs" / "scheme")
    schemes = make_schemes(specs, load_scores([str(result)]))
    save("schemes", start)
    start = clock()
    schemes = [with_cache(scheme, arguments.kv_cache) for scheme in schemes]
    plans, refused = plan_exports(schemes, work / "export")
    for name, error in refused.items():
        print(f"{name}: {error}")
    ranges = export.shared_ranges(plans, device)
    save("plan and calibrate", start)

    source = open_checkpoint(folder)
    largest = max(entry.stop - entry.start for entry in source.entries.values())
    model = sum(entry.stop - entry.start for entry in source.entries.values())
    record["source"] = {"bytes": model, "largest_tensor": largest, "tensors": len(source.entries)}
    for plan in plans:
        memory = Memory()
        export._timed = memory.timed
        start = clock()
        try:
            made = export.export_scheme(plan, device, ranges, export.known_exports(plan.target.parent))
            proof, passed = made.proof.to_json(), True
        except export.NotProven as error:
            print(error)
            proof, passed = json.loads((error.report / "proof.json").read_text()), False
        memory.close()
        proof["layers"] = proof["layers"][:3]  # as a sample; the figures over all are in the metrics
        above = memory_of_read_back(memory.phases, model, device)
        record["schemes"][plan.scheme.name] = {
            "passed": passed,
            "metrics": made.metrics if passed else {},
            "seconds": proof["seconds"],
            "read_back_bytes_above": above,
            "read_back_in_largest_tensors": {k: v / largest for k, v in above.items()},
            "memory": memory.phases,
            "proof": proof,
        }
        save(f"export and prove {plan.scheme.name}", start)
        for phase, value in proof["seconds"].items():
            print(f"    {phase}: {value:.1f} s")
        shown = {key: round(value / largest, 2) for key, value in above.items()}
        print(f"    read-back above the loaded model, in largest tensors: {shown}")
    start = clock()
    probed = probe_schemes(schemes, arguments.probe_rows, min(arguments.probe_rows, 8), device, ROOT)
    record["probe"] = asdict(probed) | {"provenance": {}}
    record["probe_table"] = markdown(probed)
    save("probe", start)
    print(record["probe_table"])
    shutil.rmtree(work)
    failed = [name for name, scheme in record["schemes"].items() if not scheme["passed"]]
    if failed:
        raise SystemExit(f"not proven: {', '.join(failed)}")


if __name__ == "__main__":
    main()
