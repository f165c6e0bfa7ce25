"""The one-pass engine: many candidates scored in one forward and backward per batch.

In the forward every scored linear keeps its input ``x`` and output ``y``; when the gradient ``g`` of ``y``
arrives, ``Σ (g · (W_c · Q_c(x) − y))²`` is added for every candidate ``c`` and ``x`` and ``y`` are let go. Weights
are quantized once per distinct weight quantizer, inputs once per distinct input quantizer, and one calibration
forward serves all static input ranges (``max`` needs nothing but the range). The sums are ModelOpt's raw scores.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from layerbits.calibration import Batch
from layerbits.scoring import distributed
from layerbits.scoring.job import Scores, ScoringJob, kl_weights
from layerbits.scoring.memory import checkpointed, plan_memory
from layerbits.scoring.search import Search, assemble, calibrate, step_of
from layerbits.scoring.steplog import StepLog
from layerbits.scoring.steps import has_plain_head
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
    modules = [model.get_submodule(n) for n in search.names]
    largest = max(s.input_ids.numel() for b in batches for s in b.segments)
    memory = plan_memory(model, modules, largest, len(search.settings.weights), job.memory)
    taps = Taps(model, search.names, search.settings, keep_weights=memory.mode == "fast")
    log = StepLog(job.workdir, job.fingerprint)

    clock = time.perf_counter
    start = clock()
    calibrate(taps, job, log, search.need_logits)
    seconds = {"calibrate": clock() - start}

    start = clock()
    resumed = log.read(0) is not None
    mode = memory.mode
    chunked = memory.pieces and not search.need_logits and has_plain_head(model, batches[0])
    for index in progress(range(distributed.rank(), len(batches), distributed.world()), "scoring"):
        if log.read(index) is None:
            scores, owner, mode = _score_batch(taps, batches[index], mode, chunked)
            log.write(index, step_of(scores, owner, batches[index], search.group_of, len(search.groups)))
    distributed.barrier()
    steps = [step for step in map(log.read, range(len(batches))) if step is not None]
    seconds["score"] = clock() - start
    fell_back = "the GPU ran out of memory in memory=fast; the pass went on in memory=lean"
    return assemble(
        job,
        search,
        steps,
        weights=kl_weights(np.array([b.loss_tokens for b in batches], dtype=np.float64)),
        details=list(zip(search.group_of.tolist(), search.names, strict=True)),
        seconds=seconds,
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


def _score_batch(taps: Taps, batch: Batch, mode: str, chunked: bool) -> tuple[Any, Any, str]:
    """Scores a batch; falls back to ``lean`` once where ``fast`` runs out of GPU memory."""
    import torch

    if mode == "fast":
        try:
            return (*taps.score(batch, chunked), mode)
        except torch.OutOfMemoryError:
            print("out of GPU memory in memory=fast; going on in memory=lean", file=sys.stderr, flush=True)
        taps.drop_weights()
        torch.cuda.empty_cache()
    with checkpointed(taps.model):
        return (*taps.score(batch, chunked), "lean")
