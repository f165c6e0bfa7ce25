"""Which way the distributions would move if a linear's output were larger, and how far a served model has moved so.

A runtime that reads one scale of 210 wrongly moves the distributions less than rounding does, but always in the one
direction, and rounding moves them in none. With the served probabilities ``q``, the expected ones ``p̄`` and the model's
``p``, the derivative of ``Σ (q - p̄) log p`` by the logarithm of a linear's gain is the projection of the deviation on
the direction of that linear (the score of a score test, C. R. Rao 1948). One backward gives it for all linears and all
positions: it is the product of the output and its gradient, summed over the features. Over the Fisher information it
estimates by how much the gain is off; that comes from a second backward, with tokens drawn from ``p``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch
    from layerbits.results.result import FloatArray
    from layerbits.serving.distributions import Events


@dataclass(frozen=True, eq=False)
class GainScores:
    """Scores of the gains of ``L`` linears.

    Attributes:
        linears: Their names.
        scores: ``[L, captions]`` the projection at the positions of each caption.
        information: ``[L]`` Fisher information of each gain, all captions together; estimated, to about
            ``sqrt(2 / captions)`` of it.
    """

    linears: tuple[str, ...]
    scores: FloatArray
    information: FloatArray


@dataclass
class _Sums:
    """Products of outputs and their gradients at the positions of each caption, while segments run."""

    captions: int
    owner: NDArray[np.int64]
    now: int = 0
    by_linear: dict[str, FloatArray] = field(default_factory=dict)

    def add(self, name: str, products: FloatArray) -> None:
        if products.shape == self.owner.shape:  # not those of a vision tower
            sums = self.by_linear.setdefault(name, np.zeros((2, self.captions)))
            sums[self.now] += np.bincount(self.owner.ravel(), products.ravel(), self.captions)


def gain_scores(model: PreTrainedModel, batches: Sequence[Batch], events: Events, deviation: FloatArray) -> GainScores:
    """Projects a deviation on the gains of a model's linears, but its head.

    Args:
        model: The restored checkpoint; its parameters take no gradient from then on.
        batches: The texts.
        events: The events of ``deviation``.
        deviation: ``[E]`` probability as served less the expected one.
    """
    import torch

    from layerbits.scoring.steps import predictions

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    captions = np.unique(np.concatenate([s.sample.numpy().ravel() for b in batches for s in b.segments]))
    generator = torch.Generator().manual_seed(0)
    sums = _Sums(len(captions), np.empty(0, np.int64))
    first = 0
    for segment in (s for batch in batches for s in batch.segments):
        sums.owner = np.searchsorted(captions, segment.sample.numpy())
        with torch.enable_grad(), _listening(model, sums):
            logprobs = predictions(model, segment)[0].float().log_softmax(-1)
            mine = slice(*np.searchsorted(events.position, (first, first + len(logprobs))))
            place, token = (torch.from_numpy(x[mine]).to(logprobs.device) for x in (events.position, events.token))
            sums.now = 0
            values = torch.from_numpy(deviation[mine]).to(logprobs)
            (logprobs[place - first, token] * values).sum().backward(retain_graph=True)
            sums.now = 1
            drawn = torch.multinomial(logprobs.detach().cpu().exp(), 1, generator=generator).to(logprobs.device)
            logprobs.gather(1, drawn).sum().backward()
        first += len(logprobs)
    projections = np.stack([*sums.by_linear.values()])[:, :, captions >= 0]  # padding belongs to no caption
    return GainScores(tuple(sums.by_linear), projections[:, 0], (projections[:, 1] ** 2).sum(1))


@contextmanager
def _listening(model: PreTrainedModel, sums: _Sums) -> Iterator[None]:
    """Adds, in each backward, the product of each linear's output and its gradient to ``sums``."""
    import torch

    head = model.get_output_embeddings()

    def listen(name: str) -> Callable[[nn.Module, tuple[object, ...], torch.Tensor], None]:
        def forward(_module: nn.Module, _inputs: tuple[object, ...], out: torch.Tensor) -> None:
            if not out.requires_grad:
                out.requires_grad_()
            value = out.detach()
            out.register_hook(lambda gradient: sums.add(name, (gradient * value).sum(-1).double().cpu().numpy()))

        return forward

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    hooks = [module.register_forward_hook(listen(name)) for name, module in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
