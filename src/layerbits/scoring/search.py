"""What the engines share around the measuring itself: groups before it, ranges, steps, and the scores after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from layerbits.inputs.calibration import Batch
from layerbits.inputs.experts import expert_notes, named_experts
from layerbits.inputs.models import output_head, unscored_patterns
from layerbits.results.assignment import IntArray
from layerbits.results.result import FloatArray, Group, NonFinite
from layerbits.results.routing import Routing
from layerbits.scoring import distributed, quantizers
from layerbits.scoring.groups import named_groups, with_active
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.modality import clipped, image_ranges
from layerbits.scoring.state import Decision, SearchState, decisions, search_state
from layerbits.scoring.steplog import Calibrated, Step, StepLog
from layerbits.scoring.taps import Taps

_NAMED = 100  # scores that are not finite are named up to this many a step


@dataclass(frozen=True)
class Search:
    """What is searched over.

    Attributes:
        decisions: All decisions of the model. searched: Those with a group each, in the order of ``groups`` (``G``).
        unscored: Name patterns that stay unquantized.
        names: Linears of the groups (``M``). group_of: Their groups, ``[M]``.
        settings: Distinct quantizer settings of the candidates.
        experts: Number of experts by name, of the expert modules among ``names``, in order.
        need_logits: Whether the output head is scored.
        notes: What the user should know.
    """

    decisions: tuple[Decision, ...]
    searched: tuple[Decision, ...]
    unscored: tuple[str, ...]
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    group_of: IntArray
    settings: quantizers.QuantizerSettings
    experts: Mapping[str, int]
    need_logits: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, job: ScoringJob) -> Search:
        """Groups the scored linears of a job.

        Raises:
            Unsupported: A candidate needs ModelOpt's own search (``engine=stock``).
        """
        model = job.loaded.model
        unscored = unscored_patterns(model, set(job.scored))
        every = decisions(model, unscored)
        searched = [d for d in every if d.searched]
        head = output_head(model)
        names = tuple(n for d in searched for n in d.modules)
        named = named_groups(model, [(d.modules, d.weights) for d in every], head)
        groups = [g for g, d in zip(named, every, strict=True) if d.searched]
        experts = named_experts(model)
        return cls(
            decisions=tuple(every),
            searched=tuple(searched),
            unscored=tuple(unscored),
            groups=with_active(groups, job.active_ratio),
            names=names,
            group_of=np.repeat(np.arange(len(searched)), [len(d.modules) for d in searched]),
            settings=quantizers.distinct_settings(list(job.configs.values())),
            experts={name: experts[name].count for name in names if name in experts},
            need_logits=head in job.scored,
            notes=expert_notes(model),
        )


def calibrate(taps: Taps, job: ScoringJob, log: StepLog, need_logits: bool) -> Calibrated:
    """Makes taps ready to score: finds the ranges, or takes those of an earlier start of the same pass.

    Returns:
        What was found; tokens per expert are all zero where no range had to be.
    """
    known = next((known for known in distributed.gather(log.read_calibration()) if known is not None), None)
    if known is None:
        mine = job.calibration.calib[distributed.rank() :: distributed.world()]
        pictured = any(s.pictures for batch in job.calibration.calib for s in batch.segments)
        taps.calibrate(mine, need_logits, pictured)
        parts = distributed.gather((taps.ranges(), taps.take_routed(), taps.images.take()))
        ranges, routed = [part[0] for part in parts], [part[1] for part in parts]
        known = Calibrated(
            {n: np.maximum.reduce([r[n] for r in ranges if n in r]) for n in {n for r in ranges for n in r}},
            {n: np.sum([r[n] for r in routed if n in r], axis=0) for n in {n for r in routed for n in r}},
            clipped([part[2] for part in parts]),
        )
    log.write_calibration(known)
    known = log.read_calibration() or known  # that of another process that was faster
    taps.load_ranges(known.ranges)
    taps.copy_what_changes(job.calibration.score[0])
    return known


def step_of(
    by_token: torch.Tensor,
    owner: torch.Tensor,
    batch: Batch,
    group_of: IntArray,
    groups: int,
    loss: float,
    routed: Mapping[str, IntArray] | None = None,
    every_token: bool = False,
) -> Step:
    """Sums per-token scores to groups, in total and per sample.

    Args:
        by_token: ``[M, C, T]`` scores of linears, or of groups.
        owner: ``[T]`` sample of each token, -1 at padding.
        batch: The rows that they come from.
        group_of: ``[M]`` group of each.
        groups: How many groups there are.
        loss: Of the unquantized model on the batch, nats, summed.
        routed: Tokens per expert, by expert module.
        every_token: Whether ``T`` are all tokens of the batch, so that those at image positions can be told apart.
    """
    device = by_token.device
    summed = torch.zeros((groups, *by_token.shape[1:]), dtype=torch.float64, device=device)
    summed.index_add_(0, torch.as_tensor(group_of, device=device), by_token.double())
    samples, slots = torch.unique(owner[owner >= 0], return_inverse=True)
    shares = torch.zeros((*summed.shape[:2], len(samples)), dtype=torch.float64, device=device)
    shares.index_add_(2, slots.to(device), summed[:, :, (owner >= 0).to(device)])
    images = np.zeros((0, 0, 0))
    if every_token and any(s.pictures for s in batch.segments):
        at_image = torch.cat([s.image_tokens.flatten() for s in batch.segments]).to(device)
        of_images = torch.zeros_like(shares)
        of_images.index_add_(2, slots.to(device), (summed * at_image)[:, :, (owner >= 0).to(device)])
        images = of_images.permute(2, 0, 1).cpu().numpy()
    counted = torch.cat([s.sample[s.loss_mask] for s in batch.segments])
    raw = summed.sum(dim=2)
    bad = np.zeros((0, 3), dtype=np.int64) if bool(torch.isfinite(raw).all()) else _bad(by_token, owner)
    raw[~torch.isfinite(raw)] = torch.nan
    return Step(
        raw=raw.cpu().numpy(),
        samples=samples.numpy().astype(np.int64),
        sample_raw=shares.permute(2, 0, 1).cpu().numpy(),
        sample_tokens=np.array([int((counted == s).sum()) for s in samples], dtype=np.int64),
        bad=bad,
        loss=loss,
        routed=np.concatenate([*(routed or {}).values(), np.zeros(0, dtype=np.int64)]).astype(np.int64),
        image_raw=images,
    )


def _bad(by_token: torch.Tensor, owner: torch.Tensor) -> npt.NDArray[np.int64]:
    """Row of ``by_token``, candidate and sample of what is not finite, each once, the first ``_NAMED``."""
    samples, slots = torch.unique(owner, return_inverse=True)
    flags = torch.zeros((*by_token.shape[:2], len(samples)), device=by_token.device)
    flags.index_add_(2, slots.to(by_token.device), (~torch.isfinite(by_token)).float())
    where = torch.nonzero(flags)[:_NAMED].cpu()
    return np.stack([where[:, 0].numpy(), where[:, 1].numpy(), samples[where[:, 2]].numpy()], axis=1)


def assemble(
    job: ScoringJob,
    search: Search,
    steps: Sequence[Step],
    *,
    weights: FloatArray,
    details: Sequence[tuple[int, str]],
    seconds: Mapping[str, float],
    calibrated: Calibrated,
    resumed: bool,
    memory: Mapping[str, float],
    mode: str = "",
    notes: tuple[str, ...] = (),
) -> Scores:
    """Solves the budget of each candidate and puts the scores together.

    Args:
        job: The job.
        search: From :meth:`Search.of`.
        steps: All of them, ``B``.
        weights: ``[B]`` what a batch's raw score counts in the predicted KL.
        details: What the first column of :attr:`Step.bad` stands for: group and description.
        seconds: Time by phase, so far.
        calibrated: From :func:`calibrate`.
        resumed: Whether a step was there before.
        memory: Figures in GB.
        mode: Memory mode that ran.
        notes: What the user should know.
    """
    start = time.perf_counter()
    raw_by_batch = np.stack([s.raw for s in steps])
    raw = raw_by_batch.sum(axis=0)
    sample_kl, sample_tokens = _by_sample(steps, weights)
    states, chosen = solved(job, search, raw)
    image_kl = _of_images(steps, weights, len(sample_kl))
    candidates = list(job.configs)
    return Scores(
        groups=search.groups,
        raw=raw,
        predicted_kl=np.tensordot(weights, raw_by_batch, axes=1),
        chosen=chosen,
        states=states,
        other_weights=sum(d.weights for d in search.decisions if not d.searched),
        sample_kl=sample_kl,
        sample_tokens=sample_tokens,
        loss_per_token=sum(s.loss for s in steps) / sum(b.loss_tokens for b in job.calibration.score),
        nonfinite=tuple(
            NonFinite(search.groups[details[m][0]].key, candidates[c], sample=int(sample), detail=details[m][1])
            for step in steps
            for m, c, sample in step.bad.tolist()
        ),
        seconds={**seconds, "solve": time.perf_counter() - start},
        memory=memory,
        mode=mode,
        resumed=resumed,
        routing=_routing(search, steps, calibrated.routed),
        sample_image_kl=image_kl,
        image_ranges=image_ranges(calibrated.images, search),
        notes=(*search.notes, *notes),
    )


def solved(
    job: ScoringJob, search: Search, raw: FloatArray
) -> tuple[dict[str, SearchState], dict[str, tuple[bool, ...]]]:
    """Solves the budget of each candidate.

    Args:
        job: The job.
        search: Its search.
        raw: ``[G, C]`` raw scores.

    Returns:
        Candidate name → ModelOpt's search state, and → per group whether the solver quantized it.
    """
    states = {
        name: search_state(
            job.method,
            search.decisions,
            search.unscored,
            name,
            config=config,
            raw=_solvable(raw[:, c]),
            target_bits=job.target_bits,
            active_ratio=job.active_ratio if job.cost_model == "active_moe" else None,
        )
        for c, (name, config) in enumerate(job.configs.items())
    }
    flags = {
        name: tuple(state["best"]["recipe"][d.name].num_bits < 16 for d in search.searched)
        for name, state in states.items()
    }
    return states, flags


def _routing(search: Search, steps: Sequence[Step], calibrated: Mapping[str, IntArray]) -> tuple[Routing, ...]:
    """Tokens per expert of each expert module."""
    routings, at = [], 0
    scored = np.sum([s.routed for s in steps], axis=0) if all(len(s.routed) for s in steps) else np.zeros(0, int)
    for name, count in search.experts.items():
        group = search.groups[int(search.group_of[search.names.index(name)])]
        seen = calibrated.get(name, np.zeros(0, int))
        calibration = tuple(int(n) for n in seen) if np.any(seen) else ()
        routings.append(Routing(group.key, group.block, calibration, tuple(int(n) for n in scored[at : at + count])))
        at += count
    return tuple(routings)


def _solvable(raw: FloatArray) -> FloatArray:
    """Scores for the solver: what is not finite costs more than all the rest, so that it is quantized last."""
    known = raw[np.isfinite(raw)].sum()
    return np.where(np.isfinite(raw), raw, 2 * known if known > 0 else 1.0)


def _by_sample(steps: Sequence[Step], weights: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """``[S, G, C]`` share of each sample in the predicted KL, and ``[S]`` loss tokens."""
    samples = 1 + max(int(s.samples.max()) for s in steps)
    kl = np.zeros((samples, *steps[0].raw.shape))
    counts = np.zeros(samples, dtype=np.int64)
    for step, weight in zip(steps, weights, strict=True):
        kl[step.samples] += step.sample_raw * weight
        counts[step.samples] += step.sample_tokens
    return kl, counts


def _of_images(steps: Sequence[Step], weights: FloatArray, samples: int) -> FloatArray | None:
    """``[S, G, C]`` of the predicted KL what comes from image positions; ``None`` where no row has any."""
    if not any(step.image_raw.size for step in steps):
        return None
    kl = np.zeros((samples, *steps[0].raw.shape))
    for step, weight in zip(steps, weights, strict=True):
        if step.image_raw.size:
            kl[step.samples] += step.image_raw * weight
    return kl
