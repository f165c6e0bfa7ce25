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
from layerbits.models import output_head, unscored_patterns
from layerbits.result import NonFinite
from layerbits.scoring import distributed, quantizers
from layerbits.scoring.groups import named_groups
from layerbits.scoring.job import Scores, ScoringJob, predicted_kl
from layerbits.scoring.memory import checkpointed, plan_memory
from layerbits.scoring.state import decisions, search_state
from layerbits.scoring.steplog import Step, StepLog
from layerbits.scoring.steps import has_plain_head
from layerbits.scoring.taps import Taps, progress

_NAMED = 100  # scores that are not finite are named up to this many a step


def score(job: ScoringJob) -> Scores:
    """Scores all candidates of a job in one pass; the model itself is never changed.

    Under ``torchrun`` the batches are shared out to the processes and every process returns the same scores.

    Raises:
        Unsupported: A candidate or the model needs ModelOpt's own search (``engine=stock``).
        UserError: A scored linear is not called, or called twice, in a forward pass.
    """
    model = job.loaded.model
    unscored = unscored_patterns(model, set(job.scored))
    found = decisions(model, unscored)
    searched = [d for d in found if d.searched]
    head = output_head(model)
    groups = named_groups([(d.modules, d.weights) for d in searched], head)
    names = [n for d in searched for n in d.modules]
    group_of = np.repeat(np.arange(len(searched)), [len(d.modules) for d in searched])
    settings = quantizers.distinct_settings(list(job.configs.values()))
    modules = [model.get_submodule(n) for n in names]
    largest = max(s.input_ids.numel() for b in job.calibration.score for s in b.segments)
    memory = plan_memory(model, modules, largest, len(settings.weights), job.memory)
    taps = Taps(model, names, settings, keep_weights=memory.mode == "fast")
    log = StepLog(job.workdir, job.fingerprint)
    notes: list[str] = []

    clock = time.perf_counter
    start = clock()
    _calibrate(taps, job, log, need_logits=head in job.scored)
    seconds = {"calibrate": clock() - start}

    start = clock()
    resumed = log.read(0) is not None
    mode = memory.mode
    chunked = memory.pieces and head not in job.scored and has_plain_head(model, job.calibration.score[0])
    mine = list(range(distributed.rank(), len(job.calibration.score), distributed.world()))
    for index in progress(mine, "scoring"):
        if log.read(index) is None:
            batch = job.calibration.score[index]
            linear_scores, owner, mode = _score_batch(taps, batch, mode, chunked)
            log.write(index, _step(linear_scores, owner, batch, group_of, len(groups)))
    if mode != memory.mode:
        notes.append("the GPU ran out of memory in memory=fast; the pass went on in memory=lean")
    distributed.barrier()
    steps = [log.read(index) for index in range(len(job.calibration.score))]
    seconds["score"] = clock() - start

    raw_by_batch = np.stack([s.raw for s in steps if s is not None])
    tokens = np.array([b.loss_tokens for b in job.calibration.score], dtype=np.float64)
    raw = raw_by_batch.sum(axis=0)
    sample_kl, sample_tokens = _by_sample(steps, tokens)
    start = clock()
    states = {
        name: search_state(
            job.method, found, unscored, name, config=config, raw=np.nan_to_num(raw[:, c]), target_bits=job.target_bits
        )
        for c, (name, config) in enumerate(job.configs.items())
    }
    seconds["solve"] = clock() - start
    candidates = list(job.configs)
    return Scores(
        groups=groups,
        raw=raw,
        predicted_kl=predicted_kl(raw_by_batch, tokens),
        chosen={n: tuple(s["best"]["recipe"][d.name].num_bits < 16 for d in searched) for n, s in states.items()},
        states=states,
        other_weights=sum(d.weights for d in found if not d.searched),
        sample_kl=sample_kl,
        sample_tokens=sample_tokens,
        nonfinite=tuple(
            NonFinite(groups[group_of[m]].key, candidates[c], sample=int(sample), detail=names[m])
            for step in steps
            if step is not None
            for m, c, sample in step.bad.tolist()
        ),
        seconds=seconds,
        memory={
            "estimate_gb": memory.estimate_gb,
            "fast_estimate_gb": memory.fast_gb,
            "lean_estimate_gb": memory.lean_gb,
            "free_gb": memory.free_gb,
        },
        mode=mode,
        resumed=resumed,
        notes=tuple(notes),
    )


def _calibrate(taps: Taps, job: ScoringJob, log: StepLog, need_logits: bool) -> None:
    """Finds the ranges, or takes those of an earlier start of the same pass."""
    known = log.read_ranges()
    if known is None:
        batches = job.calibration.calib[distributed.rank() :: distributed.world()]
        taps.calibrate(batches, need_logits)
        log.write_ranges(taps.ranges(), part=1 + distributed.rank())
        distributed.barrier()
        parts = [log.read_ranges(1 + r) or {} for r in range(distributed.world())]
        names = {name for part in parts for name in part}
        known = {name: np.maximum.reduce([p[name] for p in parts if name in p]) for name in names}
        if distributed.rank() == 0:
            log.write_ranges(known)
    taps.load_ranges(known)


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


def _step(linear_scores: Any, owner: Any, batch: Batch, group_of: Any, groups: int) -> Step:
    """Sums per-token scores ``[M, C, T]`` of linears to groups, in total and per sample."""
    import torch

    device = linear_scores.device
    bad = torch.nonzero(~torch.isfinite(linear_scores))[:_NAMED].cpu()
    by_token = torch.zeros((groups, *linear_scores.shape[1:]), dtype=torch.float64, device=device)
    by_token.index_add_(0, torch.as_tensor(group_of, device=device), linear_scores.double())
    samples, slots = torch.unique(owner[owner >= 0], return_inverse=True)
    shares = torch.zeros((*by_token.shape[:2], len(samples)), dtype=torch.float64, device=device)
    shares.index_add_(2, slots.to(device), by_token[:, :, (owner >= 0).to(device)])
    counted = torch.cat([s.sample[s.loss_mask] for s in batch.segments])
    raw = by_token.sum(dim=2)
    raw[~torch.isfinite(raw)] = torch.nan
    return Step(
        raw=raw.cpu().numpy(),
        samples=samples.numpy().astype(np.int64),
        sample_raw=shares.permute(2, 0, 1).cpu().numpy(),
        sample_tokens=np.array([int((counted == s).sum()) for s in samples], dtype=np.int64),
        bad=np.stack([bad[:, 0].numpy(), bad[:, 1].numpy(), owner[bad[:, 2]].numpy()], axis=1),
    )


def _by_sample(steps: list[Step | None], tokens: Any) -> tuple[Any, Any]:
    """``[S, G, C]`` share of each sample in the predicted KL, and ``[S]`` loss tokens."""
    known = [s for s in steps if s is not None]
    samples = 1 + max(int(s.samples.max()) for s in known)
    kl = np.zeros((samples, *known[0].raw.shape))
    counts = np.zeros(samples, dtype=np.int64)
    for step, n in zip(known, tokens, strict=True):
        kl[step.samples] += step.sample_raw * (n**2 / tokens.sum() / 2)
        counts[step.samples] += step.sample_tokens
    return kl, counts
