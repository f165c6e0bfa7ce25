"""How much memory a pass takes, so that its mode is chosen before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layerbits.scoring.steps import LOGITS_AT_ONCE

MODES = ("auto", "fast", "lean")

_AUTOGRAD = 0.8
"""Bytes that autograd keeps per byte of the scored linears' inputs and outputs (attention, norms, activations)."""
_LOGIT = 18
"""Bytes per logit of the loss: logits, their float32 copy, log-probabilities and gradients."""
_HEADROOM = 0.92  # of what is free: the allocator's fragments and the kernels' workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """The mode of a pass and why.

    Attributes:
        mode: ``fast`` keeps activations and quantized weights; ``lean`` recomputes activations block by block and
            quantizes weights on the fly.
        pieces: Whether the loss must make its logits in pieces to fit.
        estimate_gb: Estimated peak of the chosen mode.
        fast_gb: The least that ``fast`` takes. lean_gb: The least that ``lean`` takes, both with logits in pieces.
        free_gb: Memory that is free for the pass, the loaded model counted as free.
    """

    mode: str
    pieces: bool
    estimate_gb: float
    fast_gb: float
    lean_gb: float
    free_gb: float


def plan_memory(model: Any, linears: list[Any], tokens: int, weight_settings: int, wanted: str) -> MemoryPlan:
    """Estimates both modes and picks one.

    Args:
        model: The loaded model.
        linears: The scored modules.
        tokens: Tokens of the largest segment.
        weight_settings: Distinct weight quantizers whose weights ``fast`` keeps.
        wanted: One of :data:`MODES`; ``auto`` takes ``fast`` where it fits.
    """
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    size = linears[0].weight.element_size()
    blocks = max(1, getattr(getattr(model.config, "text_config", model.config), "num_hidden_layers", 1))
    kept = sum(m.in_features + m.out_features for m in linears) * tokens * size * (1 + _AUTOGRAD)
    copies = weight_settings * sum(m.weight.numel() for m in linears) * size
    largest = 2 * max(m.weight.numel() for m in linears) * size * max(1, weight_settings)
    boundary = blocks * tokens * linears[0].in_features * size
    logits = tokens * model.get_output_embeddings().weight.shape[0] * _LOGIT
    piece = min(logits, LOGITS_AT_ONCE * _LOGIT)
    fast = own + kept + copies + piece
    lean = own + kept / blocks + boundary + largest + piece
    free = own + _free_bytes(linears[0].weight.device)
    mode = wanted if wanted != "auto" else ("fast" if fast <= _HEADROOM * free else "lean")
    least = fast if mode == "fast" else lean
    pieces = least - piece + logits > _HEADROOM * free
    estimate = least if pieces else least - piece + logits
    return MemoryPlan(mode, pieces, estimate / 1e9, fast / 1e9, lean / 1e9, free / 1e9)


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Gradient checkpointing for the body, and the model as it was afterwards.

    Reentrant, so that a linear's forward runs with gradients only when its block is recomputed.
    """
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    training = [m.training for m in layers]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in layers:
        layer.training = True  # the layer alone: its children stay in eval mode, no dropout
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for layer, was in zip(layers, training, strict=True):
            layer.training = was


def _free_bytes(device: Any) -> int:
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available
