"""A few blocks of a model's shape with random weights, scored on this machine: what the whole model will take.

Blocks are alike, so seconds and peak memory are lines over the number of blocks. Two points give the line: both are run
with the settings that the whole model would be run with (logits in pieces or not, quantized weights kept or not).
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.inputs.calibration import Batch, Calibration, Segment
from layerbits.inputs.models import LoadedModel, ResolvedModel, build, language_model_linears
from layerbits.inputs.offload import offload
from layerbits.progress import hidden
from layerbits.results.result import ModelInfo
from layerbits.scoring import onepass
from layerbits.scoring.job import ScoringJob
from layerbits.scoring.memory import MemoryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_STEPS = 3  # after one that warms up
_ROUNDS = 2
"""Of these the quicker counts: where launching kernels takes the time, what else the host does is in it."""
_BLOCKS = {"fast": (2, 4), "lean": (2, 4), "offload": (4, 8)}
"""Blocks of the two points; with fewer than four every block stays on the device in ``offload``."""


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        seconds: To score a batch. calibrate_seconds: To run a calibration batch.
        device_gb: Peak on the device; NaN on a CPU, where a process has no peak of its own.
    """

    seconds: float
    calibrate_seconds: float
    device_gb: float


@dataclass(frozen=True)
class Work:
    """What is scored.

    Attributes:
        resolved: The model.
        scored: Names of the scored modules of the whole model.
        configs: Candidate name → search config.
        shapes: ``(rows, length)`` of the segments of the largest batch.
        method: ``gradient`` or ``fisher``. draws: Of ``fisher``.
        device: ``cpu`` or ``cuda``.
    """

    resolved: ResolvedModel
    scored: Sequence[str]
    configs: Mapping[str, dict[str, object]]
    shapes: Sequence[tuple[int, int]]
    method: str
    draws: int
    device: str


def blocks_of(config: PreTrainedConfig) -> int:
    """Decoder blocks of a configuration."""
    return int(getattr(config, "text_config", config).num_hidden_layers)


def estimate(work: Work, memory: MemoryPlan) -> Cost:
    """Measures two small models and follows the line to the whole one.

    Args:
        work: What is scored.
        memory: How the whole model would be run.

    Raises:
        UserError: Even a few blocks do not fit.
    """
    few, more = _BLOCKS[memory.mode]
    whole = blocks_of(work.resolved.config)
    if whole <= more:
        return measure(work, memory, whole)
    a, b = measure(work, memory, few), measure(work, memory, more)

    def follow(x: float, y: float) -> float:
        return x + (y - x) * (whole - few) / (more - few)

    return Cost(
        follow(a.seconds, b.seconds),
        follow(a.calibrate_seconds, b.calibrate_seconds),
        follow(a.device_gb, b.device_gb),
    )


def measure(work: Work, memory: MemoryPlan, blocks: int) -> Cost:
    """Scores the first blocks of a model with random weights.

    Args:
        work: What is scored.
        memory: How.
        blocks: How many.

    Raises:
        UserError: They do not fit.
    """
    import torch

    try:
        return _measure(work, memory, blocks)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{blocks} blocks of {work.resolved.spec.name} and one step do not fit this GPU in memory={memory.mode}; "
            "lower autoquant.batch_size or autoquant.seq_len"
        ) from None
    finally:
        gc.collect()
        if work.device == "cuda":
            torch.cuda.empty_cache()


def _measure(work: Work, memory: MemoryPlan, blocks: int) -> Cost:
    import torch

    cuda = work.device == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if cuda else 0
    config = _first_blocks(work.resolved.config, blocks)
    with torch.device(work.device):
        model = build(config, work.resolved.dtype).eval()
    model.config.use_cache = False
    if memory.mode == "offload":
        offload(model, work.device)
        if cuda:
            torch.cuda.empty_cache()
    info = ModelInfo("sample", "sample", "0", type(model).__name__, str(model.dtype))
    loaded = LoadedModel(model, None, info, language_model_linears(model))
    scored = tuple(n for n in loaded.linears if n in set(work.scored))
    with tempfile.TemporaryDirectory() as folder, hidden():
        job = ScoringJob(
            loaded=loaded,
            scored=scored,
            configs=work.configs,
            calibration=_rows(work, model, 1),
            method=work.method,
            target_bits=12.0,
            workdir=Path(folder) / "warm",
            fingerprint="sample",
            draws=work.draws,
        )
        onepass.score(job, memory)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        job = replace(job, calibration=_rows(work, model, _STEPS))
        rounds = [onepass.score(replace(job, workdir=Path(folder) / str(i)), memory).seconds for i in range(_ROUNDS)]
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else float("nan")
    score, calibrate = (min(seconds[part] for seconds in rounds) / _STEPS for part in ("score", "calibrate"))
    return Cost(score, calibrate, peak)


def _first_blocks(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = getattr(config, "text_config", config)
    whole = text.num_hidden_layers
    for key, value in vars(text).items():  # layer_types and the like
        if isinstance(value, list) and len(value) == whole:
            setattr(text, key, value[:blocks])
    text.num_hidden_layers = blocks
    return config


def _rows(work: Work, model: PreTrainedModel, steps: int) -> Calibration:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    batches = []
    for step in range(steps):
        segments = []
        for rows, length in work.shapes:
            ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
            mask = torch.ones(rows, length, dtype=torch.bool)
            mask[:, 0] = False
            segments.append(Segment(ids, None, mask, torch.full((rows, length), step, dtype=torch.int32)))
        batches.append(Batch(tuple(segments)))
    return Calibration(tuple(batches), tuple(batches), steps, ())
