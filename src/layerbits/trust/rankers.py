"""Metrics that rank groups, all on the same rows and ranges: what a validation compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from layerbits.errors import UserError
from layerbits.inputs.offload import offloaded
from layerbits.plain import JsonObject
from layerbits.results.result import FloatArray
from layerbits.scoring import fisher, kl, onepass
from layerbits.scoring.checkpointing import checkpointed
from layerbits.scoring.job import Scores, ScoringJob, kl_weights
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search, step_of
from layerbits.scoring.steps import calibration_forward
from layerbits.trust.agreement import Captions
from layerbits.trust.settings import RANKERS

IN_NATS = ("gradient", "gradient_token", "fisher", "kl_div")
"""Rankers that predict nats per token. The two errors are cheap baselines: a mean squared error of the weights, and
one of the outputs relative to their power."""

OF_TOWERS = ("gradient", "weight_mse", "output_mse")
"""Those that score a vision tower too: the others sum over tokens, or run from one decoder block to the next."""


@dataclass(frozen=True)
class Ranking:
    """One ranker's prediction.

    Attributes:
        predicted: ``[G]`` nats per token, or an error without a unit.
        samples: What it is the mean of, ``None`` where captions do not add up to it.
        seconds: What it took.
    """

    name: str
    predicted: FloatArray
    samples: Captions | None
    seconds: float


def rank(name: str, job: ScoringJob, linears: ReplacedLinears, search: Search) -> Ranking:
    """Scores the groups of a job that has one candidate by one of :data:`layerbits.trust.settings.RANKERS`.

    Args:
        name: The ranker.
        job: The job, of any method.
        linears: Its linears, with their ranges.
        search: Its groups.

    Raises:
        UserError: There is no such ranker.
    """
    start = time.perf_counter()
    if name in ("gradient", "fisher", "kl_div"):
        engine = kl if name == "kl_div" else onepass
        with TemporaryDirectory() as folder:
            scores = engine.score(replace(job, method=name, workdir=Path(folder)))
        predicted, samples = scores.predicted_kl[:, 0], _samples(scores)
    elif name == "gradient_token":
        shares, tokens = gradient_token(job, linears, search)
        predicted, samples = shares[:, :, 0].sum(axis=0), Captions(shares[:, :, 0] * tokens.sum(), tokens)
    elif name == "weight_mse":
        predicted, samples = _weight_mse(linears, search), None
    elif name == "output_mse":
        predicted, samples = _output_mse(job, linears, search), None
    else:
        raise UserError(f"{name} is no ranker; use {', '.join(RANKERS)}, all or none")
    return Ranking(name, predicted, samples, time.perf_counter() - start)


def _samples(scores: Scores) -> Captions | None:
    if scores.sample_kl is None or scores.sample_tokens is None:
        return None
    tokens = scores.sample_tokens.astype(float)
    return Captions(scores.sample_kl[:, :, 0] * tokens.sum(), tokens)


def gradient_token(job: ScoringJob, linears: ReplacedLinears, search: Search) -> tuple[FloatArray, FloatArray]:
    """The gradient score with the features of a token summed before they are squared.

    Returns:
        ``[S, G, C]`` share of each caption in the predicted KL, and ``[S]`` loss tokens.
    """
    groups, batches = len(search.groups), job.calibration.score
    weights = kl_weights(np.array([b.loss_tokens for b in batches], dtype=np.float64))
    samples = 1 + max(int(s.sample.max()) for b in batches for s in b.segments)
    shares, tokens = np.zeros((samples, groups, len(job.configs))), np.zeros(samples)
    model = job.loaded.model
    for batch, weight in zip(batches, weights, strict=True):
        recomputed = offloaded(model) is not None
        with checkpointed(model) if recomputed else nullcontext():
            signed = linears.score(batch, chunked=False, labels=lambda _logits, targets: targets, recomputed=recomputed)
        squares = fisher.windowed(signed.by_token, signed.owner, batch, search.group_of, groups, window=1)
        step = step_of(squares, signed.owner, batch, np.arange(groups), groups, signed.loss)
        shares[step.samples] += step.sample_raw * weight
        tokens[step.samples] += step.sample_tokens
    return shares, tokens


def _weight_mse(linears: ReplacedLinears, search: Search) -> FloatArray:
    errors = np.zeros(len(search.groups))
    with torch.no_grad():
        for g, group in enumerate(search.groups):
            for name in group.modules:
                errors[g] += linears.weight_error(name, 0)
    return errors / np.array([g.weights for g in search.groups])


def _output_mse(job: ScoringJob, linears: ReplacedLinears, search: Search) -> FloatArray:
    model = job.loaded.model
    errors, powers = (np.zeros(len(search.groups)) for _ in range(2))

    def see(group: int, quantized: Callable[..., torch.Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: JsonObject, output: torch.Tensor) -> None:
            errors[group] += float((quantized(*args, **kwargs) - output).float().square().sum())
            powers[group] += float(output.float().square().sum())

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(see(g, forward), with_kwargs=True)
        for g in range(len(search.groups))
        for name, forward in linears.quantized(search, g, 0).items()
    ]
    try:
        with torch.no_grad():
            for batch in job.calibration.score:
                calibration_forward(model, batch, search.need_logits)
    finally:
        for handle in handles:
            handle.remove()
    return errors / powers
