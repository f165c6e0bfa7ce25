"""How much memory a pass takes, so that its mode is chosen before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.offload import SLOTS, offloaded, parts_of
from layerbits.scoring.steps import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("auto", "fast", "lean", "offload")

_AUTOGRAD = 0.5
"""Bytes that autograd keeps per byte of the scored modules' inputs and outputs (attention, norms, activations): counted
on a CPU in bf16 0.48 for the blocks of Qwen3-4B, 0.42 for 8B, 0.29 for SmolLM2."""
_AUTOGRAD_EXPERTS = 0.85
"""The same where experts keep but what enters them: 0.84 for Qwen3-30B-A3B."""
LOGIT = 12
"""Bytes per logit of the loss at its peak: log-probabilities and two gradients in float32."""
_KEEP = 0.85  # of what is free, up to which copies that could be made again are kept
HEADROOM = 0.92
"""Of what is free: the rest is the allocator's fragments and the kernels' workspaces."""


@dataclass(frozen=True)
class ModuleFootprint:
    """What a scored module takes.

    Attributes:
        width: Features of its input.
        kept: Features per token that are kept until the gradient comes.
        moved: Features per token that it reads and writes.
        scored: Weights of the module. active: Of these, what a token meets.
        experts: Whether they are those of experts.
        passing: Bytes of quantized weights while the module is scored.
        outputs: Bytes of its outputs and inputs under one candidate. Of a linear, both are there for each weight
            setting at once.
    """

    width: int
    kept: int
    moved: int
    scored: int
    active: int
    experts: bool
    passing: float
    outputs: float

    def together(self, settings: int) -> tuple[float, float]:
        """Weights and outputs that are there at once, for some weight settings."""
        many = 1 if self.experts else settings
        return self.passing * many, self.outputs * many


@dataclass(frozen=True)
class ScoredWeights:
    """How many weights a pass scores.

    Attributes:
        count: All of them. active: Of these, what a token meets. experts: Of these, those of experts.
        features: What the scored modules read and write for a token.
    """

    count: int
    active: int
    experts: int
    features: int

    @classmethod
    def of(cls, footprints: Sequence[ModuleFootprint]) -> ScoredWeights:
        """Of the scored modules."""
        return cls(
            count=sum(footprint.scored for footprint in footprints),
            active=sum(footprint.active for footprint in footprints),
            experts=sum(footprint.scored for footprint in footprints if footprint.experts),
            features=sum(footprint.moved for footprint in footprints),
        )


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's own weights.

    Attributes:
        whole: All of them. resident: What of them is not streamed.
        block: The largest decoder block, 0 where there is none to stream.
    """

    whole: int
    resident: int
    block: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelBytes:
        """Of a model, which may be on the meta device."""
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        try:
            parts = parts_of(model)
        except Unsupported:  # nothing to stream
            return cls(whole, whole, 0)
        return cls(whole, whole - parts.total_bytes, parts.block_bytes)

    @property
    def offloaded(self) -> int:
        """What ``offload`` has of the model on the device."""
        return self.resident + SLOTS * self.block


@dataclass(frozen=True)
class Kept:
    """Bytes that wait for the backward pass.

    Attributes:
        activations: What autograd and the taps keep of all blocks. boundary: The inputs of the blocks.
        blocks: How many there are.
    """

    activations: float
    boundary: int
    blocks: int


@dataclass(frozen=True)
class Copies:
    """Bytes of the quantized weights that may be kept.

    Attributes:
        linears: Of linears. experts: Of experts.
    """

    linears: int
    experts: int


@dataclass(frozen=True)
class Passing:
    """Bytes that come and go while the module is scored that takes most.

    Attributes:
        largest: Weights included. transient: The same where copies of linears are kept. outputs: Where all are.
    """

    largest: float
    transient: float
    outputs: float

    @classmethod
    def of(cls, footprints: Sequence[ModuleFootprint], settings: int) -> Passing:
        """Of the scored modules under some weight settings."""
        together = [(footprint.experts, *footprint.together(settings)) for footprint in footprints]
        return cls(
            largest=max(weights + outputs for _, weights, outputs in together),
            transient=max(weights + outputs if experts else outputs for experts, weights, outputs in together),
            outputs=max(outputs for _, _, outputs in together),
        )


@dataclass(frozen=True)
class LossBytes:
    """Bytes of the loss.

    Attributes:
        whole: With whole logits. piece: With logits in pieces.
    """

    whole: int
    piece: int


@dataclass(frozen=True)
class Needs:
    """What a pass takes; known from the shapes alone."""

    weights: ScoredWeights
    model: ModelBytes
    kept: Kept
    copies: Copies
    passing: Passing
    loss: LossBytes

    @classmethod
    def of(
        cls, model: PreTrainedModel, footprints: Sequence[ModuleFootprint], tokens: int, weight_settings: int
    ) -> Needs:
        """Of a model, which may be on the meta device.

        Args:
            model: The model.
            footprints: Of the scored modules.
            tokens: Tokens of the largest segment.
            weight_settings: Distinct weight quantizers.
        """
        embedding = model.get_input_embeddings().weight
        size = embedding.element_size()
        weights = ScoredWeights.of(footprints)
        blocks = max(1, getattr(getattr(model.config, "text_config", model.config), "num_hidden_layers", 1))
        autograd = _AUTOGRAD_EXPERTS if weights.experts else _AUTOGRAD
        width = max(footprints[0].width, embedding.shape[-1])  # a tower's linears come first
        logits = tokens * model.get_output_embeddings().weight.shape[0] * LOGIT
        return cls(
            weights=weights,
            model=ModelBytes.of(model),
            kept=Kept(
                activations=sum(footprint.kept for footprint in footprints) * tokens * size * (1 + autograd),
                boundary=blocks * tokens * width * size,
                blocks=blocks,
            ),
            copies=Copies(
                linears=weight_settings * (weights.count - weights.experts) * size,
                experts=weight_settings * weights.experts * size,
            ),
            passing=Passing.of(footprints, max(1, weight_settings)),
            loss=LossBytes(whole=logits, piece=min(logits, LOGITS_AT_ONCE * LOGIT)),
        )

    def device_bytes(self, mode: str, copies: bool = False, experts: bool = False, whole: bool = False) -> float:
        """What a mode takes on the device at its peak: when the loss is made, or in the block that takes most.

        Args:
            mode: The mode.
            copies: Whether ``fast`` keeps quantized weights of linears.
            experts: Whether it keeps those of experts.
            whole: Whether logits are made whole, not in pieces.
        """
        # The logits are gone before the first block's gradient comes, so that they never meet what passes there.
        loss = self.loss.whole if whole else self.loss.piece
        if mode == "fast":
            kept = (self.copies.linears if copies else 0) + (self.copies.experts if experts else 0)
            passing = self.passing.outputs if experts else self.passing.transient if copies else self.passing.largest
            return self.model.whole + self.kept.activations + kept + max(loss, passing)
        weights = self.model.whole if mode == "lean" else self.model.offloaded
        one_block = self.kept.activations / self.kept.blocks + self.passing.largest
        return weights + self.kept.boundary + max(loss, one_block)

    @property
    def host_bytes(self) -> int:
        """What ``offload`` takes of host memory while it loads."""
        return self.model.whole + self.model.block


@dataclass(frozen=True)
class MemoryPlan:
    """The mode of a pass and why.

    Attributes:
        mode: ``fast`` keeps activations and, where they fit, quantized weights; ``lean`` recomputes activations block
            by block and quantizes weights on the fly; ``offload`` is ``lean`` with the weights of the blocks in host
            memory.
        keep_weights: Whether quantized weights of linears are kept. keep_experts: Those of experts too.
        pieces: Whether the loss must make its logits in pieces to fit.
        boundary_in_host_memory: Whether the inputs of the blocks must wait there for their backward.
        estimate_gb: Estimated peak of the chosen mode.
        fast_gb: The least that ``fast`` takes. lean_gb: The least that ``lean`` takes. offload_gb: The least that
            ``offload`` takes on the device, all with logits in pieces.
        free_gb: Memory that is free for the pass, the loaded model counted as free.
    """

    mode: str
    keep_weights: bool
    keep_experts: bool
    pieces: bool
    boundary_in_host_memory: bool
    estimate_gb: float
    fast_gb: float
    lean_gb: float
    offload_gb: float
    free_gb: float


def plan_memory(
    model: PreTrainedModel, footprints: Sequence[ModuleFootprint], tokens: int, weight_settings: int, wanted: str
) -> MemoryPlan:
    """Estimates the modes and picks one.

    Args:
        model: The loaded model; where its weights are in host memory, the mode is ``offload``.
        footprints: Of the scored modules.
        tokens: Tokens of the largest segment.
        weight_settings: Distinct weight quantizers whose weights ``fast`` may keep.
        wanted: One of :data:`MODES`; ``auto`` takes ``fast`` where it fits.

    Raises:
        UserError: ``offload`` is wanted of a model that was loaded onto its device.
    """
    needs = Needs.of(model, footprints, tokens, weight_settings)
    streamed = offloaded(model) is not None
    if wanted == "offload" and not streamed:
        raise UserError("memory=offload needs a model that was loaded for it: its weights are on the device already")
    free = (needs.model.offloaded if streamed else needs.model.whole) + free_bytes(
        model.get_input_embeddings().weight.device
    )
    return choose(needs, free, "offload" if streamed else wanted)


def choose(needs: Needs, free: float, wanted: str) -> MemoryPlan:
    """Picks a mode and its details by the estimates.

    Args:
        needs: What a pass takes.
        free: Bytes that it may take, the model's own included.
        wanted: One of :data:`MODES`; ``auto`` takes ``fast`` where it fits, else ``lean``.
    """
    room = HEADROOM * free
    keep = needs.device_bytes("fast", copies=True) <= _KEEP * free
    both = bool(needs.weights.experts) and needs.device_bytes("fast", copies=True, experts=True) <= _KEEP * free
    fast, lean = needs.device_bytes("fast", keep, both), needs.device_bytes("lean")
    offload = needs.device_bytes("offload")
    mode = wanted if wanted != "auto" else ("fast" if fast <= room else "lean")
    keep, both = keep and mode == "fast", both and mode == "fast"
    least, whole = (needs.device_bytes(mode, keep, both, whole) for whole in (False, True))
    crowded = mode == "offload" and least > room
    if crowded:
        least, whole = least - needs.kept.boundary, whole - needs.kept.boundary
    pieces = whole > room
    return MemoryPlan(
        mode=mode,
        keep_weights=keep,
        keep_experts=both,
        pieces=pieces,
        boundary_in_host_memory=crowded,
        estimate_gb=(least if pieces else whole) / 1e9,
        fast_gb=fast / 1e9,
        lean_gb=lean / 1e9,
        offload_gb=offload / 1e9,
        free_gb=free / 1e9,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on a device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))  # None = the current card
        return min(free + torch.cuda.memory_reserved(device), allowed) - allocated
    return free_host_bytes()


def free_host_bytes() -> int:
    """Host memory that is free, within the limit of this process's control group."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text("utf-8")) - int(Path(used).read_text("utf-8")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, free)


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
