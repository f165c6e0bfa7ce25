"""A model whose weights stay in host memory: each decoder block is on the device while it runs.

The weights of a block lie in one flat piece of page-locked host memory. On the device there is room for two blocks:
while one computes, the next is copied beside it on a stream of its own. Which block comes next is learned from the
order of the blocks so far (up in a forward, down in a backward that recomputes), so that the copy is there in time.
Weights are never written, so nothing is copied back. Everything outside the blocks, and every vector within them
(norms, biases), stays on the device.

On a CPU the same code swaps the weights in and out of two pieces of ordinary memory, for tests.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.blocks import block_lists
from layerbits.inputs.residence import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOTS = 2
"""Blocks that are on the device at once: the one that computes, and the next."""
_ALIGN = 256  # bytes, of a tensor within a block


@dataclass(frozen=True)
class Parts:
    """What of a model is streamed.

    Attributes:
        blocks: The decoder blocks, in order.
        streamed: Per block its parameters that are streamed.
    """

    blocks: tuple[nn.Module, ...]
    streamed: tuple[tuple[nn.Parameter, ...], ...]

    @property
    def block_bytes(self) -> int:
        """The largest block, as it lies in memory."""
        return max(sum(_room(p) for p in parameters) for parameters in self.streamed)

    @property
    def total_bytes(self) -> int:
        """All blocks."""
        return sum(_room(p) for parameters in self.streamed for p in parameters)


def parts_of(model: PreTrainedModel) -> Parts:
    """Finds the decoder blocks of a language model; the model may be on the meta device.

    What lies outside the blocks stays on the device, and so does a weight that is not of one block alone (Zamba2).

    Raises:
        Unsupported: Its linears are in no list of blocks, or in several.
    """
    lists = block_lists(model)
    if len(lists) != 1:
        where = " and ".join(lists) or "no list"
        raise Unsupported(
            f"there are decoder blocks in {where}; memory=offload streams one list of them, use memory=lean"
        )
    (blocks,) = (tuple(block_list) for block_list in lists.values())
    inside = {module for block in blocks for module in block.modules()}
    outside = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    owners = Counter([*outside, *(id(p) for block in blocks for p in block.parameters())])
    streamed = tuple(tuple(p for p in block.parameters() if p.dim() > 1 and owners[id(p)] == 1) for block in blocks)
    if not all(streamed):
        raise Unsupported("a decoder block has no weights of its own; memory=offload cannot stream it, use memory=lean")
    return Parts(blocks, streamed)


def offload(model: PreTrainedModel, device: torch.device | str) -> Offloaded:
    """Moves the weights of a model's blocks to host memory, wherever they are, and the rest onto the device.

    Args:
        model: A causal language model; from now on it runs on ``device``, and cannot be trained.
        device: Where it computes.

    Raises:
        Unsupported: It has no single list of decoder blocks.
        UserError: Host or device memory ran out.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    parts = parts_of(model)
    try:
        return Offloaded(model, parts, device)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"the weights of {parts.total_bytes / 1e9:.1f} GB do not fit into host memory, or what stays on {device} "
            f"does not fit there ({str(error).splitlines()[0]}); free some, or use model.device_map=auto"
        ) from None


def offloaded(model: PreTrainedModel) -> Offloaded | None:
    """The streaming of a model, ``None`` where its weights are where it computes."""
    return vars(model).get(MARK)


class _Block:
    """One block: its weights in host memory, and as what they are seen."""

    def __init__(self, module: nn.Module, parameters: tuple[nn.Parameter, ...]) -> None:
        self.module = module
        self.parameters = parameters
        self.host = torch.empty(sum(_room(p) for p in parameters), dtype=torch.uint8)
        self._layout = []
        at = 0
        for parameter in parameters:
            self._layout.append((at, parameter.numel() * parameter.element_size(), parameter.dtype, parameter.shape))
            at += _room(parameter)
        self._home = self._views(self.host)
        with torch.no_grad():
            for parameter, home in zip(parameters, self._home, strict=True):
                home.copy_(parameter)
                parameter.data = home

    def enter(self, slot: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Points the parameters at their copy on the device."""
        for parameter, view in zip(self.parameters, self._views(slot), strict=True):
            parameter.data = view if dtype is None else view.to(dtype)

    def leave(self) -> None:
        """Points them at host memory again."""
        for parameter, home in zip(self.parameters, self._home, strict=True):
            parameter.data = home

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat[at : at + size].view(dtype).view(shape) for at, size, dtype, shape in self._layout]


class Offloaded:
    """A model with its blocks in host memory; made by :func:`offload`.

    Attributes:
        device: Where it computes.
        parts: What is streamed.
        pinned: Whether the host memory is page-locked, so that copies overlap with computing.
        copied_bytes: What was copied to the device so far.
    """

    def __init__(self, model: PreTrainedModel, parts: Parts, device: torch.device) -> None:
        self.device, self.parts = device, parts
        self.copied_bytes = 0
        self._model = model
        self._cuda = device.type == "cuda"
        self._dtype: torch.dtype | None = None
        self._order = _Order(len(parts.blocks))
        self._blocks = [_Block(m, p) for m, p in zip(parts.blocks, parts.streamed, strict=True)]
        streamed = {id(p) for block in self._blocks for p in block.parameters}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in streamed:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        size = max(len(block.host) for block in self._blocks)
        self._slots = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(self._blocks)))
        ]
        self._holds: list[int | None] = [None] * len(self._slots)
        self._entered: set[int] = set()
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._arrived = [torch.cuda.Event() for _ in self._slots] if self._cuda else []
        self._forwards: list[Callable[..., object] | None] = []
        locked: list[torch.Tensor] = []
        self._unlock = weakref.finalize(self, _unlock, locked)
        self.pinned = self._cuda and all(_lock(block.host, locked) for block in self._blocks)
        for index, block in enumerate(self._blocks):
            for module in block.module.modules():
                vars(module)[MARK] = (self, index)
            self._forwards.append(vars(block.module).get("forward"))
            block.module.forward = self._streamed(index, block.module.forward)
        vars(model)[MARK] = self

    def fetch(self, index: int, visit: bool = False) -> None:
        """Makes a block resident and starts to copy the one that will be wanted next.

        Args:
            index: The block.
            visit: Whether it is about to run; running twice in a row is part of the order of blocks.
        """
        if not visit and index == self._order.current:
            return
        self._order.visit(index)
        wanted = [index, *self._order.upcoming(len(self._slots) - 1)]
        self._bring(wanted)

    @contextmanager
    def widened(self, dtype: torch.dtype) -> Iterator[None]:
        """Blocks are converted when they arrive."""
        self._evict()
        self._dtype = dtype
        try:
            yield
        finally:
            self._dtype = None
            self._evict()

    def close(self) -> None:
        """The model as an ordinary one in host memory."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
        self._evict()
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            for module in block.module.modules():
                vars(module).pop(MARK, None)
            if forward is None:
                del vars(block.module)["forward"]
            else:
                block.module.forward = forward
        vars(self._model).pop(MARK, None)
        self._slots.clear()
        self._unlock()

    def _bring(self, wanted: list[int]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # weights stay ordinary tensors, whoever asks for them
            for block in wanted:
                if block not in self._holds:
                    free = next(s for s, present in enumerate(self._holds) if present not in wanted)
                    self._copy(block, free)
            slot = self._holds.index(wanted[0])
            if self._cuda:
                torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
            if wanted[0] not in self._entered:
                self._blocks[wanted[0]].enter(self._slots[slot], self._dtype)
                self._entered.add(wanted[0])

    def _streamed(self, index: int, forward: Callable[..., object]) -> Callable[..., object]:
        def fetched(*args: object, **kwargs: object) -> object:
            self.fetch(index, visit=True)
            return forward(*args, **kwargs)

        return fetched

    def _copy(self, index: int, slot: int) -> None:
        before = self._holds[slot]
        if before is not None:
            self._leave(before)
        self._holds[slot] = index
        host = self._blocks[index].host
        self.copied_bytes += len(host)
        target = self._slots[slot][: len(host)]
        if self._stream is None:
            target.copy_(host)
            return
        # what still computes with the block that was here was launched before
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def _leave(self, index: int) -> None:
        self._blocks[index].leave()
        self._entered.discard(index)

    def _evict(self) -> None:
        for index in list(self._entered):
            self._leave(index)
        self._holds = [None] * len(self._slots)
        self._order.current = -1


class _Order:
    """The order of the blocks, as far as it was seen: what came after two blocks before will come again."""

    def __init__(self, blocks: int) -> None:
        self.current = -1
        self._before = -1
        self._last = blocks - 1
        self._after: dict[tuple[int, int], int] = {}

    def visit(self, block: int) -> None:
        """The block is wanted now."""
        self._after[self._before, self.current] = block
        self._before, self.current = self.current, block

    def upcoming(self, count: int) -> list[int]:
        """The next blocks other than the current one, each once."""
        following: dict[int, None] = {}
        for block in islice(self._expected(), 2 * self._last + 4):
            if len(following) == count:
                break
            if block != self.current:
                following[block] = None
        return list(following)[:count]

    def _expected(self) -> Iterator[int]:
        before, current = self._before, self.current
        while True:
            guess = current + 1 if current > before else current - 1
            if current == before:  # it turned here
                guess = current + 1 if current == 0 else current - 1
            if not 0 <= guess <= self._last:
                guess = current
            before, current = current, self._after.get((before, current), guess)
            yield current


def _room(parameter: nn.Parameter) -> int:
    size = parameter.numel() * parameter.element_size()
    return int(-(-size // _ALIGN) * _ALIGN)


def _lock(host: torch.Tensor, locked: list[torch.Tensor]) -> bool:
    """Page-locks memory where it is: PyTorch's own pinned allocator would round a block up to a power of two."""
    done = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)) == 0
    if done:
        locked.append(host)
    return done


def _unlock(locked: list[torch.Tensor]) -> None:
    while locked:
        torch.cuda.cudart().cudaHostUnregister(locked.pop().data_ptr())
