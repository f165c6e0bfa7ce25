"""Experts under several inputs at once: the tokens of all of them side by side in one grouped product per projection.

With many experts a product reads its weights for a few dozen tokens each, so that reading is what takes the time;
candidates that share quantized weights share it. The steps are those of transformers' ``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def goes_side_by_side(module: nn.Module) -> bool:
    """Whether an expert module computes what :class:`SideBySide` does: made by transformers, no biases."""
    return hasattr(module, "has_gate") and not module.has_bias and not module.is_transposed


class SideBySide:
    """Several hidden states on one routing, sorted by expert, for any number of weights.

    Args:
        module: The expert module; its gate or activation is used.
        experts: How many it has.
        hidden: ``n`` hidden states, each ``[tokens, features]``.
        index: ``[tokens, k]`` experts of each token; a number beyond the last stands for none.
        weights: ``[tokens, k]`` their weights.
    """

    def __init__(
        self,
        module: nn.Module,
        experts: int,
        hidden: Sequence[torch.Tensor],
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        between: Callable[[torch.Tensor], torch.Tensor] = getattr(
            module, "_apply_gate" if module.has_gate else "act_fn"
        )
        self._activation = between
        self._several, (self._tokens, self._per_token) = len(hidden), index.shape
        chosen = index.reshape(-1)
        share = weights.reshape(-1).masked_fill(chosen >= experts, 0)
        expert, order = torch.sort(chosen.clamp(max=experts - 1).repeat(self._several), stable=True)
        self._where = torch.empty_like(order)
        self._where[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(experts, device=expert.device, dtype=expert.dtype)
        self._offsets = torch.searchsorted(expert, numbers, right=True).int()
        together = hidden[0] if self._several == 1 else torch.cat(list(hidden))
        self._inputs = together[order // self._per_token]
        self._share = share.repeat(self._several)[order].unsqueeze(-1)

    def outputs(
        self, tensors: Sequence[torch.Tensor], seconds: Sequence[Callable[[torch.Tensor], torch.Tensor] | None]
    ) -> torch.Tensor:
        """Outputs of the module with other weights.

        Args:
            tensors: Weights of the two projections, ``[experts, out, in]``.
            seconds: Per hidden state what is done to the activations before the second projection, ``None`` = nothing.

        Returns:
            ``[n, tokens, features]`` in the dtype of the hidden states.
        """
        from transformers.integrations.moe import _grouped_linear

        between = _grouped_linear(self._inputs, tensors[0], self._offsets)
        between = self._activation(between)
        routed = self._tokens * self._per_token
        for i, second in enumerate(seconds):
            if second is not None:
                mine = self._where[i * routed : (i + 1) * routed]
                between[mine] = second(between[mine])
        outputs = _grouped_linear(between, tensors[1], self._offsets) * self._share
        by_token = outputs[self._where].view(self._several, self._tokens, self._per_token, -1)
        return by_token.sum(dim=2).to(self._inputs.dtype)
