"""Groups whose rank decides, measured alone after the pass: their KL divergence replaces what was predicted for them.

A score predicts; quantizing a group alone and running the blocks behind it measures. Measuring every group is
``method=kl_div``; here only those are measured whose place decides something: the top of the ranking, and the groups
that may fall on either side of the solver's choice. In float32 where the model is narrower
(:mod:`layerbits.scoring.precision`), on the rows that were scored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from layerbits.errors import UserError
from layerbits.progress import planned
from layerbits.results.bootstrap import TOP, intervals, standard_error
from layerbits.results.result import FloatArray
from layerbits.scoring.features import kept_features
from layerbits.scoring.job import Scores, ScoringJob
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.passes import run_steps
from layerbits.scoring.precision import Precision, computing, plan_precision
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search, calibrate, solved, step_of
from layerbits.scoring.steplog import Step, StepLog
from layerbits.scoring.suffix import SuffixRunner, find_blocks

AUTO = "auto"
SHARE = 0.25
"""Of the price of measuring every group, up to which ``auto`` measures."""
_OFF = 2.0
"""By what factor a prediction may be off: groups so near the top may belong there."""

_PRIOR = 2.0
"""Groups that all kinds together count for in the factor of one."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidate:
    """What the choice of groups goes by, for one candidate; ``G`` groups.

    Attributes:
        predicted: ``[G]`` nats per token. low: ``[G]`` lower end of its interval. high: ``[G]`` upper end.
        quantized: ``[G]`` whether the solver quantized the group at the job's budget.
        weights: ``[G]`` number of weights.
        blocks: ``[G]`` decoder block, -1 outside.
    """

    predicted: FloatArray
    low: FloatArray
    high: FloatArray
    quantized: BoolArray
    weights: FloatArray
    blocks: npt.NDArray[np.int64]


def refine(job: ScoringJob, scores: Scores, wanted: int | str) -> Scores:
    """Measures some groups of a pass and puts what was found in the place of the predictions.

    What was not measured is multiplied by what measured / predicted was elsewhere, by kind of linear (:func:`_scales`),
    so that both are on one scale. Raw scores keep a scale of their own: they are the new predictions in its unit. What
    image positions make of a caption's KL stays the share that they had.

    Args:
        job: The job that was scored.
        scores: Its scores.
        wanted: How many groups per candidate, the most sensitive; :data:`AUTO` chooses (:func:`deciding`).

    Raises:
        UserError: There are fewer groups.
        Unsupported: The model cannot be run from a block on.
    """
    start = time.perf_counter()
    check(wanted, len(scores.groups))
    picked = [_picked(scores, c, wanted) for c in range(scores.raw.shape[1])]
    pairs = sorted((g, c) for c, those in enumerate(picked) for g in those)
    if not pairs:
        return scores
    kl, sample_kl, error, precision = _measure(job, pairs)
    predicted, raw, errors = scores.predicted_kl.copy(), scores.raw.copy(), np.full(scores.raw.shape, np.nan)
    samples = None if scores.sample_kl is None else scores.sample_kl.copy()
    factors = {}
    for c, name in enumerate(job.configs):
        mine = [(p, g) for p, (g, of) in enumerate(pairs) if of == c]
        at, groups = [p for p, _ in mine], [g for _, g in mine]
        before = scores.predicted_kl[:, c]
        factors[name], scales = _scales(kl[at], before[groups], groups, [g.kind for g in scores.groups])
        predicted[:, c] *= scales
        predicted[groups, c], errors[groups, c] = kl[at], error[at]
        raw[:, c] = predicted[:, c] / factors[name] * np.nanmedian(scores.raw[:, c] / before)
        if samples is not None:
            samples[:, :, c] *= scales
            samples[:, groups, c] = 0.0
            samples[: len(sample_kl), groups, c] = sample_kl[:, at]
    states, flags = solved(job, Search.of(job), raw)
    counts = "; ".join(f"{n}: {len(those)} groups, predictions × {factors[n]:.3g}" for n, those in
                       zip(job.configs, picked, strict=True))  # fmt: skip
    return replace(
        scores,
        raw=raw,
        predicted_kl=predicted,
        sample_kl=samples,
        sample_image_kl=_split(scores, samples),
        measured_se=errors,
        states=states,
        chosen=flags,
        factors=factors,
        seconds={**scores.seconds, "refine": time.perf_counter() - start},
        memory={**scores.memory, "refine_estimate_gb": precision.estimate_gb},
        notes=(*scores.notes, f"measured alone in {precision.dtype} on the scored rows ({counts})"),
    )


def _split(scores: Scores, samples: FloatArray | None) -> FloatArray | None:
    """What image positions make of new KLs of captions ``[S, G, C]``, as a pass split those before."""
    before, images = scores.sample_kl, scores.sample_image_kl
    if samples is None or before is None or images is None:
        return images
    return samples * np.divide(images, before, out=np.zeros_like(images), where=before > 0)


def check(wanted: int | str, groups: int) -> None:
    """Checks ``autoquant.refine`` against the number of groups.

    Raises:
        UserError: There are fewer groups.
    """
    if wanted != AUTO and int(wanted) > groups:
        raise UserError(
            f"autoquant.refine={wanted} is more than the {groups} groups that there are; use {groups} or fewer, auto, "
            "or method=kl_div, which measures all"
        )


def deciding(of: Candidate) -> list[int]:
    """Groups whose place decides, most deciding first, as many as :data:`SHARE` of measuring all of them pays for.

    First those of the first block, where predictions are worst (``docs/trust.md``). Then those that may or may not be
    among the :data:`~layerbits.results.bootstrap.TOP` most sensitive, the nearest to that line first: a prediction may
    be off by a factor of two, and its interval is added to that. Then those that may fall on either side of the
    solver's choice: their interval of damage per weight has its margin within.
    """
    known = np.isfinite(of.predicted)
    order = [g for g in np.argsort(np.where(known, -of.predicted, np.inf), kind="stable").tolist() if known[g]]
    if not order:
        return []
    first = [g for g in order if of.blocks[g] == 0]
    line = of.predicted[order[min(TOP, len(order)) - 1]]
    distance = np.abs(np.log(np.maximum(of.predicted, 1e-300) / max(line, 1e-300)))
    near = sorted((g for g in order if of.high[g] * _OFF >= line), key=lambda g: float(distance[g]))
    wanted = list(dict.fromkeys([*first, *near, *_margin(of)]))
    most = int(of.blocks.max()) + 1
    price = np.where(of.blocks < 0, 0.05, most - of.blocks) / most  # the blocks behind it
    paid, budget = 0.0, SHARE * float(price[known].sum())
    taken = []
    for g in wanted:
        if paid + price[g] <= budget:
            paid += price[g]
            taken.append(g)
    return taken


def _margin(of: Candidate) -> list[int]:
    """Groups that may fall on either side of the solver's choice, nearest to its margin first."""
    density = of.predicted / of.weights
    inside, outside = density[of.quantized], density[~of.quantized]
    if not inside.size or not outside.size or not np.isfinite(inside).any() or not np.isfinite(outside).any():
        return []
    edge = float(np.sqrt(max(np.nanmax(inside), 1e-300) * max(np.nanmin(outside), 1e-300)))
    crossing = (of.low / of.weights <= edge) & (of.high / of.weights >= edge)
    distance = np.abs(np.log(np.maximum(density, 1e-300) / edge))
    return [g for g in np.argsort(distance, kind="stable").tolist() if crossing[g]]


def _picked(scores: Scores, candidate: int, wanted: int | str) -> list[int]:
    predicted = scores.predicted_kl[:, candidate]
    if wanted != AUTO:
        order = np.argsort(np.where(np.isfinite(predicted), -predicted, np.inf), kind="stable")
        return [g for g in order[: int(wanted)].tolist() if np.isfinite(predicted[g])]
    low, high = predicted, predicted
    if scores.sample_kl is not None and scores.sample_tokens is not None:
        bounds = intervals(scores.sample_kl[:, :, candidate], scores.sample_tokens, resamples=500)
        if bounds is not None:
            low, high = bounds.low, bounds.high
    name = list(scores.chosen)[candidate]
    return deciding(
        Candidate(
            predicted,
            low,
            high,
            np.array(scores.chosen[name]),
            np.array([g.weights for g in scores.groups], dtype=float),
            np.array([-1 if g.block is None else g.block for g in scores.groups]),
        )
    )


def _scales(
    measured: FloatArray, predicted: FloatArray, groups: Sequence[int], kinds: Sequence[str]
) -> tuple[float, FloatArray]:
    """What predictions are multiplied by: the median of measured / predicted, and ``[G]`` the same by kind.

    A score errs by kind of linear as much as by group. The mean logarithm of a kind is drawn to the median of all, as
    if :data:`_PRIOR` more groups of it had that; with fewer than three measured groups nothing is known.

    Args:
        measured: ``[n]`` of the measured groups.
        predicted: ``[n]`` of the same.
        groups: ``[n]`` which they are.
        kinds: ``[G]`` kinds of all groups.
    """
    known = (measured > 0) & (predicted > 0)
    if known.sum() < 3:
        return 1.0, np.ones(len(kinds))
    logs = np.log(measured[known] / predicted[known])
    middle, of = float(np.median(logs)), np.array(kinds)[np.array(groups)[known]]
    by_kind = {k: (logs[of == k].sum() + _PRIOR * middle) / ((of == k).sum() + _PRIOR) for k in set(kinds)}
    return float(np.exp(middle)), np.exp([by_kind[k] for k in kinds])


def _measure(job: ScoringJob, pairs: Sequence[tuple[int, int]]) -> tuple[FloatArray, FloatArray, FloatArray, Precision]:
    """KL per token ``[P]``, its shares by sample ``[S, P]``, its standard error ``[P]``, and how it was measured."""
    model, batches = job.loaded.model, job.calibration.score
    search = Search.of(job)
    linears = ReplacedLinears(model, search.names, search.settings)
    # calibration is that of the pass, kept in its folder
    calibrate(linears, job, StepLog(job.workdir, job.fingerprint), search.need_logits)
    linears.fix_dtypes()
    perturbations = [linears.quantized(search, g, c) for g, c in pairs]
    digest = hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:12]
    log = StepLog(job.workdir / f"refine-{digest}", f"{job.fingerprint} {digest}")
    precision = plan_precision(model, max(s.input_ids.numel() for b in batches for s in b.segments), "auto")

    def scored(index: int) -> Step:
        runner = SuffixRunner(model, blocks, batches[index])
        kl, _ = runner.measure(perturbations)
        owner = torch.cat([s.sample[s.loss_mask] for s in batches[index].segments])
        at = np.arange(len(pairs))
        return step_of(kl[:, None], owner, batches[index], at, len(pairs), runner.loss)

    with (
        planned(scoring=(len(batches), 1 + len(pairs) / 2)),
        computing(model, precision),
        fused_norms(model),
        kept_features(model, batches, search.names),
    ):
        blocks = find_blocks(model, search.names, batches[0])
        steps = run_steps(log, len(batches), scored)
    count = 1 + max(int(s.samples.max()) for s in steps)
    sums, tokens = np.zeros((count, len(pairs))), np.zeros(count)
    for step in steps:
        sums[step.samples] += step.sample_raw[:, :, 0]
        tokens[step.samples] += step.sample_tokens
    used = tokens > 0
    error = np.array([standard_error(sums[used, p], tokens[used])[1] for p in range(len(pairs))])
    return sums.sum(axis=0) / tokens.sum(), sums / tokens.sum(), error, precision
