"""What PyTorch computes of the texts: the unquantized model, the scheme as scored, and the checkpoint restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerbits.scoring.divergence import exact_divergence
from layerbits.scoring.steps import predictions
from layerbits.serving.distributions import Events
from layerbits.serving.gain_score_test import GainScores, gain_scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from layerbits.checkpoint.reader import Checkpoint
    from layerbits.inputs.calibration import Batch
    from layerbits.probing.loading import Prepared
    from layerbits.results.result import FloatArray


REPLICAS = 3
"""Computations of the restored checkpoint in the runtime's dtype whose mean is what a sound runtime is expected to
tell: each adds 1 / ``REPLICAS`` of its rounding to that of the served one."""


@dataclass(frozen=True, eq=False)
class Whole:
    """Log-probabilities of the whole vocabulary, ``[n, vocabulary]`` float32 in host memory."""

    logprobs: torch.Tensor

    def at(self, events: Events) -> FloatArray:
        """Those of some events."""
        selected = self.logprobs[torch.from_numpy(events.position), torch.from_numpy(events.token)]
        return np.asarray(selected.double().numpy())

    def kl(self, other: Whole) -> FloatArray:
        """KL divergence of another from this one at each position, over the whole vocabulary, nats."""
        return np.asarray(exact_divergence(self.logprobs, other.logprobs).numpy())


@dataclass(frozen=True, eq=False)
class Plain:
    """The source's model on the texts, in float32.

    Attributes:
        unquantized: As it is.
        rounded: What its modules return rounded to the runtime's dtype.
    """

    unquantized: Whole
    rounded: Whole


@dataclass(frozen=True, eq=False)
class Reference:
    """Models in PyTorch, in float32, on the same texts.

    Attributes:
        plain: Without the scheme.
        scored: With the scheme, as it was scored.
        restored: The model made of the checkpoint alone.
        rounded: The same, rounded too: another computation of it, which tells what rounding alone does.
        expected: Logarithm of the mean probabilities of several such computations.
        weights: The model made of the checkpoint without the activation rounding that it asks for; ``None`` = it asks
            for none.
        gain_scores: Of events and a deviation from ``expected``, :func:`layerbits.serving.gain_score_test.gain_scores`.
    """

    plain: Plain
    scored: Whole
    restored: Whole
    rounded: Whole
    expected: Whole
    weights: Whole | None
    gain_scores: Callable[[Events, FloatArray], GainScores]


def reference(
    prepared: Prepared,
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    dtype: str,
    device: str,
    plain: Plain | None = None,
) -> Reference:
    """Computes all of them, the checkpoint after the source.

    Args:
        prepared: The scheme with its source.
        checkpoint: Its export.
        batches: The texts.
        dtype: The runtime's, ``bfloat16`` or ``float16``; ``float32`` rounds nothing.
        device: ``cpu`` or ``cuda``.
        plain: Of an earlier scheme of the same source on the same texts.

    Raises:
        UserError: The source or the checkpoint cannot be loaded.
    """
    from layerbits.checkpoint.files import check_same_code
    from layerbits.checkpoint.labels import read_quantization
    from layerbits.checkpoint.restore import restore
    from layerbits.export.plan import source_folder
    from layerbits.probing.apply import apply_scheme, find_ranges

    model = prepared.load(device).model
    ranges = find_ranges(model, [prepared.scheme], prepared.calibration)  # as they were found when it was scored
    model.float()
    if plain is None:
        unquantized = logprobs(model, batches)
        with rounding(model, dtype):
            plain = Plain(unquantized, logprobs(model, batches))
    with apply_scheme(model, prepared.scheme, ranges):
        scored = logprobs(model, batches)
    del model
    trusted = prepared.resolved.spec.trust_remote_code
    if trusted:
        check_same_code(source_folder(prepared.resolved), checkpoint.folder)
    quantization = read_quantization(checkpoint)
    weights = None
    if quantization.rounds_activations:
        weights = logprobs(restore(checkpoint, quantization.weights_only, device, trusted).float(), batches)
    restored = restore(checkpoint, quantization, device, trusted).float()
    exact = logprobs(restored, batches)
    rounded, expected = replicas(restored, batches, dtype)
    return Reference(
        plain, scored, exact, rounded, expected, weights, lambda e, d: gain_scores(restored, batches, e, d)
    )


def replicas(
    model: PreTrainedModel, batches: Sequence[Batch], dtype: str, count: int = REPLICAS
) -> tuple[Whole, Whole]:
    """A model in the runtime's dtype: once, and the logarithm of the mean probabilities of ``count`` such computations.

    The others start from embeddings that are off by up to a unit in the last place, after which they round elsewhere.
    """
    with rounding(model, dtype):
        first = logprobs(model, batches)
        mean = first.logprobs.exp()
        for seed in range(1, count):
            with _jitter(model, dtype, seed):
                mean += logprobs(model, batches).logprobs.exp_()
    return first, Whole(torch.log_(mean.div_(count).clamp_min_(torch.finfo(mean.dtype).tiny)))


def logprobs(model: PreTrainedModel, batches: Sequence[Batch]) -> Whole:
    """What a model tells of the texts."""
    with torch.no_grad():
        pieces = [predictions(model, s)[0].float().log_softmax(-1).cpu() for batch in batches for s in batch.segments]
    return Whole(torch.cat(pieces))


@contextmanager
def rounding(model: PreTrainedModel, dtype: str) -> Iterator[None]:
    """Rounds what every module without children returns, as a runtime does that computes in that dtype."""
    narrow = getattr(torch, dtype)
    leaves = [m for m in model.modules() if not list(m.children())]

    def narrowed(_module: nn.Module, _inputs: tuple[object, ...], out: object) -> object:
        return out.to(narrow).to(out.dtype) if isinstance(out, torch.Tensor) and out.is_floating_point() else out

    hooks = [module.register_forward_hook(narrowed) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _jitter(model: PreTrainedModel, dtype: str, seed: int) -> Iterator[None]:
    unit = torch.finfo(getattr(torch, dtype)).eps
    generator = torch.Generator().manual_seed(seed)

    def jittered(_module: nn.Module, _inputs: tuple[object, ...], out: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(out.shape, generator=generator).to(out.device) - 0.5
        return out * (1 + unit * noise)

    hook = model.get_input_embeddings().register_forward_hook(jittered, prepend=True)
    try:
        yield
    finally:
        hook.remove()
