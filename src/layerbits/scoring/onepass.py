"""The one-pass engine: many candidates scored in one forward and backward per batch, or in one per draw.

In the forward every scored linear keeps its input ``x`` and output ``y``; when the gradient ``g`` of ``y``
arrives, ``Σ (g · (W_c · Q_c(x) − y))²`` is added for every candidate ``c`` and ``x`` and ``y`` are let go. Weights
are quantized once per distinct weight quantizer, inputs once per distinct input quantizer, and one calibration
forward serves all static input ranges (``max`` needs nothing but the range). The sums are ModelOpt's raw scores;
``method=fisher`` sums before it squares (:mod:`layerbits.scoring.fisher`), on the same scale.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerbits.inputs.calibration import Batch
from layerbits.inputs.kinds import place_of
from layerbits.progress import part_done, planned
from layerbits.results.kv_cache import KvScore
from layerbits.results.result import FloatArray
from layerbits.scoring import distributed, fisher
from layerbits.scoring.features import kept_features
from layerbits.scoring.held import held
from layerbits.scoring.job import Scores, ScoringJob, held_cache, kl_weights
from layerbits.scoring.kv_cache import KvTaps
from layerbits.scoring.memory import MemoryPlan, checkpointed, plan_memory
from layerbits.scoring.passes import run_steps
from layerbits.scoring.search import Search, assemble, calibrate, step_of
from layerbits.scoring.steplog import Step, StepLog
from layerbits.scoring.steps import Labels, has_plain_head
from layerbits.scoring.taps import Taps

_STEP_COST = 5.0
"""What scoring a batch takes in calibration forwards, roughly (six candidates, ``benchmarks/README.md``): the estimated
end needs no more before the first step is scored."""


def score(job: ScoringJob, memory: MemoryPlan | None = None) -> Scores:
    """Scores all candidates of a job in one pass; the model itself is never changed.

    Under ``torchrun`` the batches are shared out to the processes and every process returns the same scores.

    Args:
        job: The job.
        memory: How to run it, instead of what :func:`plan_memory` makes of ``job.memory``.

    Raises:
        Unsupported: A candidate or the model needs ModelOpt's own search (``engine=stock``).
        UserError: A scored linear is not called in a forward pass, or not on every token.
    """
    model, batches = job.loaded.model, job.calibration.score
    search = Search.of(job)
    taps = Taps(model, search.names, search.settings)
    largest = max(s.input_ids.numel() for b in batches for s in b.segments)
    if memory is None:
        memory = plan_memory(model, taps.loads(largest), largest, len(search.settings.weights), job.memory)
    taps.keep_weights, taps.keep_experts = memory.keep_weights, memory.keep_experts
    log = StepLog(job.workdir, job.fingerprint)

    clock = time.perf_counter
    resumed = log.holds(0)
    chunked = memory.pieces and not search.need_logits and has_plain_head(model, batches[0])
    way = _Way(memory.mode, chunked, memory.boundary_in_host_memory)
    kv = KvTaps(model, job.kv_formats, job.loaded.info.language_model) if job.kv_formats else None

    def scored(index: int) -> Step:
        nonlocal way
        step, way = _step(taps, kv, job, search, index, way)
        if index == distributed.rank():
            job.watch(step.loss / batches[index].loss_tokens, batches[index].loss_tokens)
        return step if kv is None else replace(step, kv=kv.take())

    draws = job.draws if job.method == "fisher" else 1
    rows = (*job.calibration.calib, *batches)
    with (
        planned(calibrating=(len(job.calibration.calib), 1.0), scoring=(len(batches), _STEP_COST * draws)),
        kept_features(model, rows, search.names),
    ):
        start = clock()
        calibrated = calibrate(taps, job, log, search.need_logits)
        if kv is not None:
            kv.calibrate(job.calibration.calib)
        seconds = {"calibrate": clock() - start}
        start = clock()
        with held(model, job.held, job.calibration.calib, held_cache(job)):
            steps = run_steps(log, len(batches), scored)
        seconds["score"] = clock() - start
    weights = kl_weights(np.array([b.loss_tokens for b in batches], dtype=np.float64))
    made = assemble(
        job,
        search,
        steps,
        weights=weights,
        details=_details(job, search),
        seconds=seconds,
        calibrated=calibrated,
        resumed=resumed,
        memory={
            "estimate_gb": memory.estimate_gb,
            "fast_estimate_gb": memory.fast_gb,
            "lean_estimate_gb": memory.lean_gb,
            "offload_estimate_gb": memory.offload_gb,
            "free_gb": memory.free_gb,
        },
        mode=way.mode,
        notes=_notes(job, memory, way.mode),
    )
    return made if kv is None else replace(made, kv_cache=_kv_scores(kv, job.kv_formats, steps, weights))


def _kv_scores(kv: KvTaps, formats: Sequence[str], steps: Sequence[Step], weights: FloatArray) -> tuple[KvScore, ...]:
    by_batch = np.stack([step.kv for step in steps])
    raw, kl = by_batch.sum(axis=0), np.tensordot(weights, by_batch, axes=1)
    return tuple(
        KvScore(form, name, place_of(name).block, float(raw[a, f]), float(kl[a, f]))
        for f, form in enumerate(formats)
        for a, name in enumerate(kv.modules)
    )


@dataclass(frozen=True)
class _Way:
    """How batches are scored.

    Attributes:
        mode: Memory mode. chunked: Whether logits are made in pieces.
        boundary_in_host_memory: Whether the inputs of the blocks wait there for their backward.
    """

    mode: str
    chunked: bool
    boundary_in_host_memory: bool


def _notes(job: ScoringJob, memory: MemoryPlan, mode: str) -> tuple[str, ...]:
    notes = []
    if mode != memory.mode:
        notes.append("the GPU ran out of memory in memory=fast; the pass went on in memory=lean")
    if mode == "offload" and job.memory == "auto":
        notes.append(
            f"memory=lean takes {memory.lean_gb:.1f} GB and {memory.free_gb:.1f} GB are free on the device: the "
            "weights stayed in host memory (memory=offload)"
        )
    return tuple(notes)


def _step(taps: Taps, kv: KvTaps | None, job: ScoringJob, search: Search, index: int, way: _Way) -> tuple[Step, _Way]:
    batch, groups = job.calibration.score[index], len(search.groups)
    if job.method == "gradient":
        scores, owner, way = _score_batch(taps, kv, batch, way)
        counts = taps.take_routed()
        return step_of(scores, owner, batch, search.group_of, groups, taps.loss, counts, every_token=True), way
    total, owner = 0, None
    routed: dict[str, Any] = {}
    for draw in range(job.draws):
        labels = fisher.drawn_labels(job.seed, index, draw)
        signed, owner, way = _score_batch(taps, kv, batch, way, labels)
        routed = taps.take_routed()  # the same in every draw
        part_done((draw + 1) / job.draws)
        total = total + fisher.windowed(signed, owner, batch, search.group_of, groups) / job.draws
    return step_of(total, owner, batch, np.arange(groups), groups, taps.loss, routed, every_token=True), way


def _details(job: ScoringJob, search: Search) -> list[tuple[int, str]]:
    if job.method == "gradient":
        return list(zip(search.group_of.tolist(), search.names, strict=True))
    return [(g, "signed sum") for g in range(len(search.groups))]


def _score_batch(
    taps: Taps, kv: KvTaps | None, batch: Batch, way: _Way, labels: Labels | None = None
) -> tuple[Any, Any, _Way]:
    """Scores a batch; falls back to ``lean`` once where ``fast`` runs out of GPU memory."""
    import torch

    def scored(recomputed: bool) -> tuple[Any, Any]:
        with nullcontext() if kv is None else kv.observed(recomputed):
            return taps.score(batch, way.chunked, labels, recomputed)

    if way.mode == "fast":
        try:
            return (*scored(recomputed=False), way)
        except torch.OutOfMemoryError:
            print("out of GPU memory in memory=fast; going on in memory=lean", file=sys.stderr, flush=True)
        taps.drop_weights()
        taps.take_routed()  # of the part of the batch that was scored
        torch.cuda.empty_cache()
        way = replace(way, mode="lean")
    with checkpointed(taps.model, way.boundary_in_host_memory):
        return (*scored(recomputed=True), way)
