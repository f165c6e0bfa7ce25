"""The ``kl_div`` engine: the KL divergence that quantizing each group alone causes, measured from its block on.

ModelOpt's searcher runs a whole forward per group and candidate; here the unquantized model runs once a batch, and of
the others only what lies behind the group (:mod:`layerbits.scoring.suffix`). A raw score is the KL divergence in nats,
summed over the tokens that the loss counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from layerbits.inputs.calibration import Batch
from layerbits.progress import planned
from layerbits.results.assignment import IntArray
from layerbits.scoring import distributed
from layerbits.scoring.assigned import fixed_quantization
from layerbits.scoring.features import kept_features
from layerbits.scoring.job import Scores, ScoringJob, fixed_cache
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.passes import run_steps
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search, assemble, calibrate, step_of
from layerbits.scoring.steplog import Step, StepLog
from layerbits.scoring.suffix import Blocks, Perturbation, SuffixRunner, find_blocks


def score(job: ScoringJob) -> Scores:
    """Measures all candidates of a job; the model itself is never changed.

    The memory modes of the gradient engine do not apply: block inputs and the unquantized logits are what is kept.
    Under ``torchrun`` the batches are shared out to the processes and every process returns the same scores.

    Raises:
        Unsupported: A candidate or the model needs ModelOpt's own search (``engine=stock``).
    """
    model = job.loaded.model
    search = Search.of(job)
    linears = ReplacedLinears(model, search.names, search.settings)
    log = StepLog(job.workdir, job.fingerprint)
    batches = job.calibration.score

    clock = time.perf_counter
    resumed = log.holds(0)
    perturbations = linears.perturbations(search)

    # half of the blocks lie behind a group on average
    with (
        planned(calibrating=(len(job.calibration.calib), 1.0), scoring=(len(batches), 1 + len(perturbations) / 2)),
        kept_features(model, (*job.calibration.calib, *batches), search.names),
    ):
        start = clock()
        scorer = _BatchScorer(job, linears, find_blocks(model, search.names, batches[0]), perturbations)
        calibrated = calibrate(linears, job, log, search.need_logits)
        seconds = {"calibrate": clock() - start}
        start = clock()
        with fixed_quantization(model, job.fixed, job.calibration.calib, fixed_cache(job)), fused_norms(model):
            steps = run_steps(log, len(batches), scorer.step)
        seconds["score"] = clock() - start

    tokens = sum(b.loss_tokens for b in batches)
    return assemble(
        job,
        search,
        steps,
        weights=np.full(len(batches), 1 / tokens),
        details=[(g, "KL divergence") for g in range(len(search.groups))],
        seconds=seconds,
        calibrated=calibrated,
        resumed=resumed,
        memory={"suffix_kept_gb": scorer.kept_gb} if scorer.kept_gb else {},
    )


class _BatchScorer:
    """Measures batches one by one.

    Args:
        job: The job.
        linears: Counts the tokens of each expert.
        blocks: Of the model.
        perturbations: Every group under every candidate, the candidates of a group next to each other.

    Attributes:
        kept_gb: The most that was kept of a batch, GB.
    """

    def __init__(
        self, job: ScoringJob, linears: ReplacedLinears, blocks: Blocks, perturbations: list[Perturbation]
    ) -> None:
        self.kept_gb = 0.0
        self._job = job
        self._linears = linears
        self._blocks = blocks
        self._perturbations = perturbations

    def step(self, index: int) -> Step:
        """Measures a batch; the first of this process is shown to ``job.watch``."""
        batch = self._job.calibration.score[index]
        with self._linears.counted():
            runner = SuffixRunner(self._job.loaded.model, self._blocks, batch)
        self.kept_gb = max(self.kept_gb, runner.kept_bytes / 1e9)
        if index == distributed.rank():
            self._job.watch(runner.loss / batch.loss_tokens, batch.loss_tokens)
        groups = len(self._perturbations) // len(self._job.configs)
        step = _step(runner, self._perturbations, batch, groups)
        return replace(step, routed=_flat(self._linears.take_routed()))


def _flat(routed: Mapping[str, IntArray]) -> IntArray:
    return np.concatenate([*routed.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)


def _step(runner: SuffixRunner, perturbations: list[Perturbation], batch: Batch, groups: int) -> Step:
    kl, _ = runner.measure(perturbations)
    owner = torch.cat([s.sample[s.loss_mask] for s in batch.segments])
    return step_of(kl.unflatten(0, (groups, -1)), owner, batch, np.arange(groups), groups, runner.loss)
