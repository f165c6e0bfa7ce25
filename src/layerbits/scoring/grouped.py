"""Experts under several inputs at once: the tokens of all of them side by side in one grouped product per projection.

With many experts a product reads its weights for a few dozen tokens each, so that reading is what takes the time;
candidates that share quantized weights share it. The steps are those of transformers' ``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def takes_several(module: Any) -> bool:
    """Whether an expert module computes what :func:`several_outputs` does: made by transformers, no biases."""
    return hasattr(module, "has_gate") and not module.has_bias and not module.is_transposed


def several_outputs(
    module: Any, tensors: Sequence[Any], hidden: Sequence[Any], index: Any, weights: Any, seconds: Sequence[Any]
) -> Any:
    """Outputs of an expert module for several hidden states on one routing.

    Args:
        module: The expert module; its gate or activation is used.
        tensors: Weights of the two projections, ``[experts, out, in]``.
        hidden: ``n`` hidden states, each ``[tokens, features]``.
        index: ``[tokens, k]`` experts of each token; a number beyond the last stands for none.
        weights: ``[tokens, k]`` their weights.
        seconds: Per hidden state what is done to the activations before the second projection, ``None`` = nothing.

    Returns:
        ``[n, tokens, features]`` in the dtype of the hidden states.
    """
    import torch
    from transformers.integrations.moe import _grouped_linear

    several, (tokens, per_token), experts = len(hidden), index.shape, tensors[0].shape[0]
    routed = tokens * per_token
    chosen = index.reshape(-1)
    share = weights.reshape(-1).masked_fill(chosen >= experts, 0)
    expert, order = torch.sort(chosen.clamp(max=experts - 1).repeat(several), stable=True)
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order), device=order.device)
    numbers = torch.arange(experts, device=expert.device, dtype=expert.dtype)
    offsets = torch.searchsorted(expert, numbers, right=True).int()
    inputs = hidden[0] if several == 1 else torch.cat(list(hidden))
    between = _grouped_linear(inputs[order // per_token], tensors[0], offsets)
    between = module._apply_gate(between) if module.has_gate else module.act_fn(between)
    for i, second in enumerate(seconds):
        if second is not None:
            mine = where[i * routed : (i + 1) * routed]
            between[mine] = second(between[mine])
    outputs = _grouped_linear(between, tensors[1], offsets) * share.repeat(several)[order].unsqueeze(-1)
    return outputs[where].view(several, tokens, per_token, -1).sum(dim=2).to(hidden[0].dtype)
