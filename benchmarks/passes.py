"""What the benchmarks of a pass share: a model and its rows, timed parts, and what the model alone takes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerbits.inputs.calibration import Calibration
from layerbits.inputs.models import LoadedModel
from layerbits.provenance import provenance
from layerbits.scoring import distributed
from layerbits.scoring.checkpointing import checkpointed
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.steps import calibration_forward, has_plain_head, loss_backward
from layerbits.scoring.taps import activation_gradients

ROOT = Path(__file__).resolve().parent.parent


class Passes:
    """Passes over one model and its rows; each timed part adds a row to the record.

    Args:
        arguments: Of the script.
        loaded: The model. rows: Its rows.
        name: Of the script, for the folder of the steps.
    """

    def __init__(self, arguments: argparse.Namespace, loaded: LoadedModel, rows: Calibration, name: str) -> None:
        self.device = arguments.device
        self.loaded, self.rows = loaded, rows
        head = loaded.model.get_output_embeddings()
        self.scored = tuple(n for n in loaded.linears if loaded.model.get_submodule(n) is not head)
        # one folder for all processes of a torchrun
        self._folder = Path(tempfile.gettempdir()) / f"{name}-{os.environ.get('MASTER_PORT', os.getpid())}"
        self._jobs = 0
        self.record: dict[str, Any] = {
            "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
            "provenance": provenance(ROOT),
        }

    def job(self, wanted: dict[str, dict[str, Any]], memory: str, steps: int | None = None) -> ScoringJob:
        """A job in a fresh folder, so that nothing is resumed.

        Args:
            wanted: Search configs by candidate.
            memory: Its mode.
            steps: Batches; all by default.
        """
        rows = self.rows if steps is None else Calibration(self.rows.calib[:steps], self.rows.score[:steps], 1, ())
        self._jobs += 1
        folder = self._folder / str(self._jobs)
        return ScoringJob(self.loaded, self.scored, wanted, rows, "gradient", 12.0, folder, "benchmark", memory)

    def timed(self, name: str, run: Callable[[], Any], repeats: int = 1) -> Any:
        """Runs, and records the seconds of one run and the peak in GB."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        row = {"seconds": (time.perf_counter() - start) / repeats}
        if self.device == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if isinstance(result, Scores):
            row |= {f"seconds_{k}": v for k, v in result.seconds.items()} | dict(result.memory)
            self.record[f"{name}_notes"] = [result.mode, *result.notes]
        self.record[name] = row
        if distributed.rank() == 0:
            print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
        return result

    @cached_property
    def _chunked(self) -> bool:
        return has_plain_head(self.loaded.model, self.rows.score[0])

    def forward(self) -> None:
        """One forward over the first batch."""
        with torch.no_grad():
            calibration_forward(self.loaded.model, self.rows.score[0], need_logits=False)

    def backward(self) -> None:
        """One forward and backward."""
        model = self.loaded.model
        with activation_gradients(model):
            loss_backward(model, self.rows.score[0], chunked=self._chunked)

    def checkpointed_backward(self) -> None:
        """The same with activations made again block by block."""
        with checkpointed(self.loaded.model):
            self.backward()

    def profile(self, run: Callable[[], Any]) -> None:
        """Prints and records what a run spends its time in, kernels first."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        with profile(activities=kinds) as found:
            run()
        by = f"self_{self.device}_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
        print(table, flush=True)
        self.record["profile"] = table.splitlines()

    def write(self, out: Path | None) -> None:
        """Writes the record, in the first process."""
        if out and distributed.rank() == 0:
            out.write_text(json.dumps(self.record, indent=1) + "\n")
