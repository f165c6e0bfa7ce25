"""Gradient checkpointing: the activations of a decoder block are let go and made again when its gradients come.

The forwards of the blocks are wrapped, and nothing else of the model changes. Transformers' own switch works in
training mode alone, where some blocks drop activations (OPT, Falcon).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from layerbits.inputs.blocks import decoder_blocks
from layerbits.scoring.patches import forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def checkpointed(
    model: PreTrainedModel, boundary_in_host_memory: bool = False, reentrant: bool = False
) -> Iterator[None]:
    """While it lasts, a pass with gradients keeps the inputs of the blocks and makes the rest again.

    With reentrant checkpointing a block gets gradients through its output alone: those of keys and values that later
    blocks borrow (Gemma 4) are lost without a word.

    Args:
        model: The model, in eval mode.
        boundary_in_host_memory: Whether the inputs of the blocks wait there for their backward.
        reentrant: Whether checkpointing is reentrant, as in ModelOpt's search.
    """
    pinned = torch.cuda.is_available()

    def recomputed(forward: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            where: AbstractContextManager[object] = nullcontext()
            if boundary_in_host_memory:
                where = torch.autograd.graph.save_on_cpu(pin_memory=pinned)
            with where:
                inner = partial(forward, **kwargs)
                return checkpoint(inner, *args, use_reentrant=reentrant, preserve_rng_state=False)

        return wrapped

    with forwards({block: recomputed(block.forward) for block in decoder_blocks(model)}):
        yield
