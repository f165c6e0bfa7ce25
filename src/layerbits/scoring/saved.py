"""Tensors that wait for a gradient.

Where a block is recomputed, they are let go in the forward pass and come back with the block: they are saved as
autograd saves its own tensors, so that ``torch.utils.checkpoint`` treats them alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx


class Saved:
    """Tensors of a forward pass, to be taken once in its backward pass.

    Args:
        tensors: What is saved, without its gradients.
        recomputed: Whether the forward may run under gradient checkpointing.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], recomputed: bool) -> None:
        self._tensors: tuple[torch.Tensor, ...] = tuple(t.detach() for t in tensors)
        self._kept: torch.Tensor | None = None
        if recomputed:
            # A node beside the graph, not in it: it changes no gradient, and nothing that the model does in place. It
            # lives as long as its output.
            self._kept = _Keep.apply(torch.zeros((), requires_grad=True), *self._tensors)
            self._tensors = ()

    def take(self) -> tuple[torch.Tensor, ...]:
        """The tensors, which are not kept any longer."""
        tensors = self._tensors if self._kept is None else _saved_by(self._kept)
        self._tensors, self._kept = (), None
        return tensors


def _saved_by(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the node behind an output keeps."""
    node = output.grad_fn
    assert isinstance(node, BackwardCFunction)
    return node.saved_tensors


class _Keep(torch.autograd.Function):
    """Saves tensors for a backward that never comes."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: FunctionCtx, *_gradients: torch.Tensor) -> None:
        raise NotImplementedError
