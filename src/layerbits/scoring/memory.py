"""How much memory a pass takes, so that its mode is chosen before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layerbits.scoring.steps import LOGITS_AT_ONCE

MODES = ("auto", "fast", "lean")

_AUTOGRAD = 0.8
"""Bytes that autograd keeps per byte of the scored linears' inputs and outputs (attention, norms, activations)."""
_LOGIT = 18
"""Bytes per logit of the loss: logits, their float32 copy, log-probabilities and gradients."""
_KEEP = 0.85  # of what is free, up to which copies that could be made again are kept
_HEADROOM = 0.92  # of what is free: the allocator's fragments and the kernels' workspaces


@dataclass(frozen=True)
class Load:
    """What a scored module takes.

    Attributes:
        width: Features of its input.
        kept: Features per token that are kept until the gradient comes.
        weights: Weights of which ``fast`` may keep quantized copies; 0 where it never does.
        passing: Bytes of quantized weights and activations while the module is scored, per candidate or setting.
        passing_by_setting: Whether that is for each weight setting at once.
    """

    width: int
    kept: int
    weights: int
    passing: float
    passing_by_setting: bool


@dataclass(frozen=True)
class MemoryPlan:
    """The mode of a pass and why.

    Attributes:
        mode: ``fast`` keeps activations and, where they fit, quantized weights; ``lean`` recomputes activations block
            by block and quantizes weights on the fly.
        keep_weights: Whether quantized weights are kept.
        pieces: Whether the loss must make its logits in pieces to fit.
        estimate_gb: Estimated peak of the chosen mode.
        fast_gb: The least that ``fast`` takes. lean_gb: The least that ``lean`` takes, both with logits in pieces.
        free_gb: Memory that is free for the pass, the loaded model counted as free.
    """

    mode: str
    keep_weights: bool
    pieces: bool
    estimate_gb: float
    fast_gb: float
    lean_gb: float
    free_gb: float


def plan_memory(model: Any, loads: Sequence[Load], tokens: int, weight_settings: int, wanted: str) -> MemoryPlan:
    """Estimates both modes and picks one.

    Args:
        model: The loaded model.
        loads: Of the scored modules.
        tokens: Tokens of the largest segment.
        weight_settings: Distinct weight quantizers whose weights ``fast`` may keep.
        wanted: One of :data:`MODES`; ``auto`` takes ``fast`` where it fits.
    """
    weight = model.get_input_embeddings().weight
    own, size = sum(p.numel() * p.element_size() for p in model.parameters()), weight.element_size()
    blocks = max(1, getattr(getattr(model.config, "text_config", model.config), "num_hidden_layers", 1))
    kept = sum(load.kept for load in loads) * tokens * size * (1 + _AUTOGRAD)
    copies = weight_settings * sum(load.weights for load in loads) * size
    settings = max(1, weight_settings)
    largest = max(load.passing * (settings if load.passing_by_setting else 1) for load in loads)
    transient = max((load.passing for load in loads if not load.passing_by_setting), default=0)
    boundary = blocks * tokens * loads[0].width * size
    logits = tokens * model.get_output_embeddings().weight.shape[0] * _LOGIT
    piece = min(logits, LOGITS_AT_ONCE * _LOGIT)
    free = own + _free_bytes(weight.device)
    room = _HEADROOM * free
    # The logits are gone before the first block's gradient comes, so that they never meet what passes there.
    with_copies = own + kept + copies + max(piece, transient)
    keep = with_copies <= _KEEP * free
    fast = with_copies if keep else own + kept + max(piece, largest)
    lean = own + kept / blocks + boundary + max(piece, largest)
    mode = wanted if wanted != "auto" else ("fast" if fast <= room else "lean")
    least = fast if mode == "fast" else lean
    pieces = least - piece + logits > room
    estimate = least if pieces else least - piece + logits
    return MemoryPlan(mode, keep and mode == "fast", pieces, estimate / 1e9, fast / 1e9, lean / 1e9, free / 1e9)


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
