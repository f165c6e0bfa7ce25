"""What a model computes in while it is measured: its own dtype, or float32 with the same weights.

In bfloat16, rounding alone moves the predictions as much as quantizing one group to 8 bits does, so that most such
damage cannot be told from nothing. Widening a weight loses nothing, and neither does narrowing it again. Quantizers
still compute in the model's dtype (:func:`layerbits.scoring.quantizers.fix_dtype`), as they do when the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.models import language_model_linears, output_head
from layerbits.inputs.offload import SLOTS, offloaded, parts_of
from layerbits.inputs.residence import OWN_DTYPE
from layerbits.scoring.memory import HEADROOM, LOGIT, free_bytes
from layerbits.scoring.patches import forwards
from layerbits.scoring.settings import check_dtype
from layerbits.scoring.steps import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TILES = {"cuda": 1 << 14}  # tokens that a suffix pass runs together (layerbits.scoring.suffix), where that is much
_REMEDY = "use fewer rows at once (batch_size), weights in host memory (autoquant.memory=offload), or dtype=model"


@dataclass(frozen=True)
class Precision:
    """How a model is measured.

    Attributes:
        dtype: Name of what it computes in.
        widened: Whether that is float32 while its weights are in a narrower dtype.
        by_block: Whether each decoder block is widened only while it runs.
        estimate_gb: Memory that measuring takes on the device.
        free_gb: Memory that is free for it, the loaded model counted as free.
    """

    dtype: str
    widened: bool
    by_block: bool
    estimate_gb: float
    free_gb: float

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves some of the free memory for the allocator and the kernels."""
        return self.estimate_gb <= HEADROOM * self.free_gb

    @property
    def words(self) -> str:
        """In a few words, for a report."""
        how = ", block by block" if self.by_block else ""
        return f"{self.dtype}{how} (about {self.estimate_gb:.1f} GB, {self.free_gb:.1f} GB free)"


def plan_precision(model: PreTrainedModel, tokens: int, wanted: str, remedy: str = _REMEDY) -> Precision:
    """Chooses what a model is measured in on rows.

    Args:
        model: The loaded model.
        tokens: Tokens of the largest segment.
        wanted: One of :data:`layerbits.scoring.settings.DTYPES`; ``auto`` is float32, of the whole model where that
            fits, else block by block.
        remedy: What a refusal says is to be done.

    Raises:
        UserError: float32 does not fit.
    """
    return plan_work(model, lambda itemsize: _work(model, tokens, itemsize), wanted, remedy)


def plan_work(model: PreTrainedModel, work: Callable[[int], float], wanted: str, remedy: str) -> Precision:
    """Chooses what a model is measured in, for any work.

    Args:
        model: The loaded model.
        work: Bytes of an activation → bytes that measuring takes beside the weights.
        wanted: As of :func:`plan_precision`.
        remedy: What a refusal says is to be done.

    Raises:
        UserError: float32 does not fit.
    """
    check_dtype(wanted)
    own = model.get_input_embeddings().weight.dtype
    streaming = offloaded(model)
    devices = {p.device for p in model.parameters()} if streaming is None else {streaming.device}
    resident, whole, by_block = _weights(model)
    free = resident + sum(free_bytes(device) for device in devices)
    narrow = wanted != "model" and bool(_narrow(model.parameters()))
    beside = work(4 if narrow else own.itemsize)

    def planned(dtype: torch.dtype, block: bool, weights: float) -> Precision:
        name = str(dtype).removeprefix("torch.")
        return Precision(name, narrow, block, (weights + beside) / 1e9, free / 1e9)

    if not narrow:
        return planned(own, False, resident)
    fits = [weights is not None and weights + beside <= HEADROOM * free for weights in (whole, by_block)]
    if fits[0] and whole is not None:
        return planned(torch.float32, False, whole)
    if fits[1] and by_block is not None and (wanted == "auto" or streaming is not None):
        return planned(torch.float32, True, by_block)
    takes = [f"{(w + beside) / 1e9:.1f} GB" for w in (whole, by_block) if w is not None]
    blocks = " (block by block dtype=auto)" if fits[1] else ""
    raise UserError(
        f"measuring in float32 takes {' or, block by block, '.join(takes)} and {free / 1e9:.1f} GB are free{blocks}; "
        f"{remedy}"
    )


@contextmanager
def computing(model: PreTrainedModel, precision: Precision) -> Iterator[None]:
    """The model as planned for a while; its weights are the same bits afterwards.

    Find static ranges before, and make quantizers that are to compute in the model's dtype keep to it
    (:func:`layerbits.scoring.quantizers.fix_dtype`); a scheme that is applied inside does so by itself.
    """
    if not precision.widened:
        yield
        return
    streaming = offloaded(model)
    away: set[nn.Parameter] = set()
    with ExitStack() as stack:
        stack.enter_context(_marked(model))
        if streaming is not None:
            away = {p for block in streaming.parts.streamed for p in block}
            stack.enter_context(streaming.widened(torch.float32))
        elif precision.by_block:
            parts = parts_of(model)
            away = {p for block in parts.streamed for p in block}
            blocks = zip(parts.blocks, parts.streamed, strict=True)
            stack.enter_context(forwards({b: _widening(b.forward, _narrow(those)) for b, those in blocks}))
        narrow = [p for p in _narrow(model.parameters()) if p not in away]
        dtypes = [p.dtype for p in narrow]
        buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None and _is_narrow(b)]
        try:
            for parameter in narrow:
                parameter.data = parameter.data.float()
            for module, name, buffer in buffers:
                module._buffers[name] = buffer.float()
            yield
        finally:
            for parameter, dtype in zip(narrow, dtypes, strict=True):
                parameter.data = parameter.data.to(dtype)
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


@contextmanager
def _marked(model: PreTrainedModel) -> Iterator[None]:
    """Modules say what dtype their weights really have (:func:`layerbits.inputs.residence.own_dtype`)."""
    marked = []
    for module in model.modules():
        first = next(iter(_narrow(module.parameters())), None)
        if first is not None:
            vars(module)[OWN_DTYPE] = first.dtype
            marked.append(module)
    try:
        yield
    finally:
        for module in marked:
            del vars(module)[OWN_DTYPE]


def _widening(forward: Callable[..., object], parameters: Sequence[nn.Parameter]) -> Callable[..., object]:
    """A block's forward with its weights in float32 while it runs."""

    def widened(*args: object, **kwargs: object) -> object:
        before = [p.data for p in parameters]
        try:
            with torch.inference_mode(False), torch.no_grad():  # weights stay ordinary tensors
                for parameter in parameters:
                    parameter.data = parameter.data.float()
            return forward(*args, **kwargs)
        finally:
            for parameter, data in zip(parameters, before, strict=True):
                parameter.data = data

    return widened


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _narrow(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each 16-bit parameter once."""
    return [p for p in dict.fromkeys(parameters) if _is_narrow(p)]


def _weights(model: PreTrainedModel) -> tuple[float, float | None, float | None]:
    """Bytes of the weights on the device: as they are, all widened, and widened block by block."""
    own = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    more = float(sum(2 * p.numel() for p in _narrow(model.parameters())))
    try:
        parts = parts_of(model)
    except Unsupported:
        return own, own + more, None
    streamed = [[p for p in block if _is_narrow(p)] for block in parts.streamed]
    inside = float(sum(2 * p.numel() for block in streamed for p in block))
    widest = float(max(sum(4 * p.numel() for p in block) for block in streamed))
    if offloaded(model) is None:
        return own, own + more, own + more - inside + widest
    resident = own - parts.total_bytes + SLOTS * parts.block_bytes
    return resident, None, resident + more - inside + SLOTS * widest


def _work(model: PreTrainedModel, tokens: int, size: int) -> float:
    """Bytes of the kept block inputs, of one piece of logits, and of the widest linear with its tiles.

    The output head is never run on several tiles at once.
    """
    width = model.get_input_embeddings().weight.shape[1]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    blocks = max(1, getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    device = model.get_input_embeddings().weight.device
    together = max(tokens, _TILES.get(device.type, 0))
    head = output_head(model)
    widest = max(
        (tokens if name == head else together) * sum(shape)
        for name, shapes in language_model_linears(model).items()
        for shape in shapes
    )
    kept = (blocks + 1) * tokens * width * size
    return float(kept + min(tokens * vocabulary, LOGITS_AT_ONCE) * LOGIT + 4 * widest * size)
