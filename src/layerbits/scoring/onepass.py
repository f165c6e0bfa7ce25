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
from dataclasses import replace
from typing import Any

import numpy as np

from layerbits.inputs.calibration import Batch
from layerbits.inputs.kinds import place_of
from layerbits.results.kv_cache import KvScore
from layerbits.results.result import FloatArray
from layerbits.scoring import distributed, fisher
from layerbits.scoring.held import held
from layerbits.scoring.job import Scores, ScoringJob, held_cache, kl_weights
from layerbits.scoring.kv_cache import KvTaps
from layerbits.scoring.memory import checkpointed, plan_memory
from layerbits.scoring.search import Search, assemble, calibrate, step_of
from layerbits.scoring.steplog import Step, StepLog
from layerbits.scoring.steps import Labels, has_plain_head
from layerbits.scoring.taps import Taps, progress


def score(job: ScoringJob) -> Scores:
    """Scores all candidates of a job in one pass; the model itself is never changed.

    Under ``torchrun`` the batches are shared out to the processes and every process returns the same scores.

    Raises:
        Unsupported: A candidate or the model needs ModelOpt's own search (``engine=stock``).
        UserError: A scored linear is not called, or called twice, in a forward pass.
    """
    model, batches = job.loaded.model, job.calibration.score
    search = Search.of(job)
    taps = Taps(model, search.names, search.settings)
    largest = max(s.input_ids.numel() for b in batches for s in b.segments)
    memory = plan_memory(model, taps.loads(largest), largest, len(search.settings.weights), job.memory)
    taps.keep_weights = memory.keep_weights
    log = StepLog(job.workdir, job.fingerprint)

    clock = time.perf_counter
    start = clock()
    routed = calibrate(taps, job, log, search.need_logits)
    seconds = {"calibrate": clock() - start}

    start = clock()
    resumed = log.read(0) is not None
    mode = memory.mode
    chunked = memory.pieces and not search.need_logits and has_plain_head(model, batches[0])
    kv = KvTaps(model, job.kv_formats, job.loaded.info.language_model) if job.kv_formats else None
    if kv is not None:
        kv.calibrate(job.calibration.calib)
    with held(model, job.held, job.calibration.calib, held_cache(job)):
        for index in progress(range(distributed.rank(), len(batches), distributed.world()), "scoring"):
            if log.read(index) is None:
                with nullcontext() if kv is None else kv.observed():
                    step, mode = _step(taps, job, search, index, mode, chunked)
                if kv is not None:
                    step = replace(step, kv=kv.take())
                if index == distributed.rank():
                    job.watch(step.loss / batches[index].loss_tokens, batches[index].loss_tokens)
                log.write(index, step)
    distributed.barrier()
    steps = [step for step in map(log.read, range(len(batches))) if step is not None]
    seconds["score"] = clock() - start
    fell_back = "the GPU ran out of memory in memory=fast; the pass went on in memory=lean"
    weights = kl_weights(np.array([b.loss_tokens for b in batches], dtype=np.float64))
    made = assemble(
        job,
        search,
        steps,
        weights=weights,
        details=_details(job, search),
        seconds=seconds,
        routed=routed,
        resumed=resumed,
        memory={
            "estimate_gb": memory.estimate_gb,
            "fast_estimate_gb": memory.fast_gb,
            "lean_estimate_gb": memory.lean_gb,
            "free_gb": memory.free_gb,
        },
        mode=mode,
        notes=() if mode == memory.mode else (fell_back,),
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


def _step(taps: Taps, job: ScoringJob, search: Search, index: int, mode: str, chunked: bool) -> tuple[Step, str]:
    batch, groups = job.calibration.score[index], len(search.groups)
    if job.method == "gradient":
        scores, owner, mode = _score_batch(taps, batch, mode, chunked)
        return step_of(scores, owner, batch, search.group_of, groups, taps.loss, taps.take_routed()), mode
    device = job.loaded.model.get_input_embeddings().weight.device
    total, owner = 0, None
    routed: dict[str, Any] = {}
    for draw in range(job.draws):
        labels = fisher.drawn_labels(device, job.seed, index, draw)
        signed, owner, mode = _score_batch(taps, batch, mode, chunked, labels)
        routed = taps.take_routed()  # the same in every draw
        total = total + fisher.windowed(signed, owner, batch, search.group_of, groups) / job.draws
    return step_of(total, owner, batch, np.arange(groups), groups, taps.loss, routed), mode


def _details(job: ScoringJob, search: Search) -> list[tuple[int, str]]:
    if job.method == "gradient":
        return list(zip(search.group_of.tolist(), search.names, strict=True))
    return [(g, "signed sum") for g in range(len(search.groups))]


def _score_batch(
    taps: Taps, batch: Batch, mode: str, chunked: bool, labels: Labels | None = None
) -> tuple[Any, Any, str]:
    """Scores a batch; falls back to ``lean`` once where ``fast`` runs out of GPU memory."""
    import torch

    if mode == "fast":
        try:
            return (*taps.score(batch, chunked, labels), mode)
        except torch.OutOfMemoryError:
            print("out of GPU memory in memory=fast; going on in memory=lean", file=sys.stderr, flush=True)
        taps.drop_weights()
        torch.cuda.empty_cache()
    with checkpointed(taps.model):
        return (*taps.score(batch, chunked, labels), "lean")
