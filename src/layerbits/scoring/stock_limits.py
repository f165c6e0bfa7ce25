"""What ModelOpt's own search gets wrong of a model, seen on a few tokens before it scores.

Its gradient scores recompute every block with reentrant gradient checkpointing. There a block gets gradients through
its output alone: what later blocks send back by another way (keys and values that Gemma 4 shares between layers) is
lost. And a module that is called several times in a forward pass is scored by the change of its last call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.inputs.calibration import Batch
from layerbits.scoring.checkpointing import checkpointed
from layerbits.scoring.steps import first_tokens, loss_backward
from layerbits.scoring.tap import hooked
from layerbits.scoring.taps import activation_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOST = 1e-2
"""Relative change of a gradient from which on it is not rounding."""


def stock_warnings(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> tuple[str, ...]:
    """What a reader of ModelOpt's scores should know, a line each.

    Args:
        model: The loaded model, in eval mode.
        names: Its scored modules.
        batch: Rows, of which the first tokens are tried.
    """
    calls: Counter[str] = Counter()
    plain = _gradients(model, names, batch, lambda name: calls.update([name]))
    reentrant = _gradients(model, names, batch, lambda _name: None, reentrant=True)
    lost = {
        name: _apart(reentrant.get(name), gradient)
        for name, gradient in plain.items()
        if _apart(reentrant.get(name), gradient) > _LOST
    }
    warnings = []
    if lost:
        warnings.append(
            f"engine=stock is wrong for {len(lost)} of {len(names)} linears of this model: ModelOpt's search "
            "recomputes blocks in a way that loses the gradients which later blocks send to the keys and values of an "
            f"earlier one (up to {max(lost.values()):.0%} of a gradient, on 8 tokens); use autoquant.engine=onepass"
        )
    if several := [name for name, count in calls.items() if count > 1]:
        warnings.append(
            f"engine=stock is wrong for {several[0]}"
            + (f" and {len(several) - 1} more" if several[1:] else "")
            + ": they are called several times in a forward pass, and ModelOpt's search knows the last call alone; use "
            "autoquant.engine=onepass"
        )
    return tuple(warnings)


def _gradients(
    model: PreTrainedModel, names: Sequence[str], batch: Batch, called: Callable[[str], None], reentrant: bool = False
) -> dict[str, torch.Tensor]:
    """Gradients of the outputs of some modules, summed over their calls."""
    gradients: dict[str, torch.Tensor] = {}

    def observe(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            gradients[name] = gradients[name] + gradient if name in gradients else gradient.clone()

        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            called(name)
            if output.requires_grad:
                output.register_hook(add)

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(hooked(model.get_submodule(name).register_forward_hook(observe(name))))
        stack.enter_context(activation_gradients(model))
        stack.enter_context(checkpointed(model, reentrant=True) if reentrant else nullcontext())
        loss_backward(model, first_tokens(batch))
    return gradients


def _apart(gradient: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Relative difference of two gradients."""
    if gradient is None:
        return 1.0
    norm = expected.double().norm()
    return float((gradient.double() - expected.double()).norm() / norm) if norm > 0 else 0.0
