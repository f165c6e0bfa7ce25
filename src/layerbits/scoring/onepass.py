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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from layerbits.inputs.calibration import Batch
from layerbits.inputs.kinds import place_of
from layerbits.inputs.patches import most_patches
from layerbits.progress import part_done, planned
from layerbits.results.kv_cache import KvScore
from layerbits.results.result import FloatArray
from layerbits.scoring import distributed, fisher
from layerbits.scoring.assigned import fixed_quantization
from layerbits.scoring.batch_scores import BatchScores
from layerbits.scoring.checkpointing import checkpointed
from layerbits.scoring.features import kept_features
from layerbits.scoring.job import Scores, ScoringJob, fixed_cache, kl_weights
from layerbits.scoring.kv_cache import KvTaps
from layerbits.scoring.memory import MemoryPlan, plan_memory
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
        patches = most_patches((s for b in batches for s in b.segments), model.config)
        memory = plan_memory(
            model, taps.footprints(largest, patches), largest, len(search.settings.weights), job.memory
        )
    taps.keep_weights, taps.keep_experts = memory.keep_weights, memory.keep_experts
    log = StepLog(job.workdir, job.fingerprint)

    clock = time.perf_counter
    resumed = log.holds(0)
    chunked = memory.pieces and not search.need_logits and has_plain_head(model, batches[0])
    kv = KvTaps(model, job.kv_formats, job.loaded.info.language_model) if job.kv_formats else None
    scorer = BatchScorer(job, search, taps, kv, memory, chunked)

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
        with fixed_quantization(model, job.fixed, job.calibration.calib, fixed_cache(job)):
            steps = run_steps(log, len(batches), scorer.step)
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
        mode=scorer.mode,
        notes=_notes(job, memory, scorer.mode),
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


class BatchScorer:
    """Scores batches one by one, in ``lean`` once the device has run out of memory in ``fast``.

    Attributes:
        mode: Memory mode of the next batch.
    """

    def __init__(
        self, job: ScoringJob, search: Search, taps: Taps, kv: KvTaps | None, memory: MemoryPlan, chunked: bool
    ) -> None:
        self.mode = memory.mode
        self._job = job
        self._search = search
        self._taps = taps
        self._kv = kv
        self._chunked = chunked
        self._boundary_in_host_memory = memory.boundary_in_host_memory

    def step(self, index: int) -> Step:
        """Scores a batch; the first of this process is shown to ``job.watch``."""
        batch = self._job.calibration.score[index]
        step = self._gradient(batch) if self._job.method == "gradient" else self._fisher(batch, index)
        if index == distributed.rank():
            self._job.watch(step.loss / batch.loss_tokens, batch.loss_tokens)
        return step if self._kv is None else replace(step, kv=self._kv.take())

    def _gradient(self, batch: Batch) -> Step:
        taps, search = self._taps, self._search
        scores = self._scores(batch)
        groups, counts = len(search.groups), taps.take_routed()
        return step_of(
            scores.by_token, scores.owner, batch, search.group_of, groups, scores.loss, counts, every_token=True
        )

    def _fisher(self, batch: Batch, index: int) -> Step:
        job, search, taps, groups = self._job, self._search, self._taps, len(self._search.groups)
        total: torch.Tensor | None = None
        for draw in range(job.draws):
            signed = self._scores(batch, partial(fisher.drawn_labels, job.seed, index, draw))
            routed = taps.take_routed()  # the same in every draw
            part_done((draw + 1) / job.draws)
            squares = fisher.windowed(signed.by_token, signed.owner, batch, search.group_of, groups) / job.draws
            total = squares if total is None else total + squares
        assert total is not None
        return step_of(total, signed.owner, batch, np.arange(groups), groups, signed.loss, routed, every_token=True)

    def _scores(self, batch: Batch, labels: Callable[[], Labels] | None = None) -> BatchScores:
        """Scores of a batch.

        Args:
            batch: The rows.
            labels: Makes the labels anew: a second try draws what the first drew.
        """
        if self.mode == "fast":
            try:
                return self._once(batch, labels, recomputed=False)
            except torch.OutOfMemoryError:
                print("out of GPU memory in memory=fast; going on in memory=lean", file=sys.stderr, flush=True)
            self.mode = "lean"
            self._taps.drop_weights()
            self._taps.take_routed()  # of the part of the batch that was scored
            torch.cuda.empty_cache()
        with checkpointed(self._taps.model, self._boundary_in_host_memory):
            return self._once(batch, labels, recomputed=True)

    def _once(self, batch: Batch, labels: Callable[[], Labels] | None, recomputed: bool) -> BatchScores:
        with nullcontext() if self._kv is None else self._kv.observed(recomputed):
            return self._taps.score(batch, self._chunked, None if labels is None else labels(), recomputed)


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


def _details(job: ScoringJob, search: Search) -> list[tuple[int, str]]:
    if job.method == "gradient":
        return list(zip(search.group_of.tolist(), search.names, strict=True))
    return [(g, "signed sum") for g in range(len(search.groups))]
