"""What replacing a few linears does to the predictions, at the price of the blocks behind them.

The model runs once and the input of every decoder block is kept. For a perturbation that starts in block ``b``, the
model runs again with the blocks before ``b`` skipped and the kept input fed to ``b``: embeddings, masks and rotary
tables stay the model's own business. Perturbations that start in the same block run side by side as tiles of one larger
batch, and until a tile reaches its first replaced linear it shares the linears of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.errors import Unsupported
from layerbits.inputs.calibration import Batch, Segment
from layerbits.inputs.linears import tokens_of
from layerbits.inputs.models import output_head
from layerbits.progress import part_done
from layerbits.scoring.divergence import Reference
from layerbits.scoring.patches import Forward, Span, by_tile, forwards
from layerbits.scoring.steps import LOGITS_AT_ONCE, has_plain_head, last_hidden_states, predictions
from layerbits.scoring.tap import first_input, hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS_AT_ONCE = {"cuda": 1 << 14, "cpu": 1 << 11}
"""Tokens of all tiles together: enough to fill the matrix units, few enough to keep the activations small."""
_PROBE = 8  # tokens that starting at a block is tried with
_USE_STOCK = "kl_div from block to block cannot score it, use autoquant.engine=stock"

Arguments = tuple[torch.Tensor, ...]
"""What a module is called with by position."""
Perturbation = Mapping[str, Forward]
"""Name of a module → what computes its output from its input instead, several rows together."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model, and the linears that may be replaced.

    Attributes:
        modules: The blocks, in the order in which they run.
        of: Name of a linear → position of its block; the output head comes after the last one.
        head: Name of the output head.
        plain_head: Whether the logits are nothing but the head on the last hidden state.
    """

    modules: tuple[nn.Module, ...]
    of: Mapping[str, int]
    head: str | None
    plain_head: bool


def find_blocks(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> Blocks:
    """Finds the decoder blocks, and makes sure that a run may start at each of them.

    Args:
        model: A causal language model.
        names: Linears that may be replaced; the outermost list of modules that holds them is that of the blocks.
        batch: Rows, of which a few tokens are tried.

    Raises:
        Unsupported: The linears lie in no list or in several, or starting at a block changes the predictions.
    """
    head = output_head(model)
    lists: set[str] = set()
    of: dict[str, int] = {}
    for name in names:
        if name == head:
            continue
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        prefix = next((p for p in prefixes if isinstance(model.get_submodule(p), nn.ModuleList)), None)
        if prefix is None:
            raise Unsupported(f"{name} is in no list of decoder blocks; {_USE_STOCK}")
        lists.add(prefix)
        of[name] = int(parts[prefix.count(".") + 1])
    if len(lists) > 1:
        raise Unsupported(f"there are blocks in {' and '.join(sorted(lists))}; {_USE_STOCK}")
    modules = tuple(model.get_submodule(lists.pop())) if lists else ()
    blocks = Blocks(modules, {n: of.get(n, len(modules)) for n in names}, head, has_plain_head(model, batch))
    _check(model, blocks, batch.segments[0])
    return blocks


@dataclass(frozen=True)
class _Kept:
    """What a run of the model leaves for the suffixes of one segment.

    Attributes:
        segment: The rows.
        feeds: ``[blocks + 1]`` the input of each block, and the output of the last.
        pack: Items of the tuple that a block returns, 0 where it returns its hidden states bare.
        order: Name of a linear → when it is called.
        values: Hidden states (of a plain head) or logits at the loss positions, ``[n, ...]``.
        targets: Tokens that came true there, ``[n]``.
    """

    segment: Segment
    feeds: tuple[torch.Tensor, ...]
    pack: int
    order: Mapping[str, int]
    values: torch.Tensor
    targets: torch.Tensor


class SuffixRunner:
    """Measures perturbations on one batch; keeps the model's block inputs and logits for it.

    Args:
        model: A causal language model; between calls it is as it was.
        blocks: From :func:`find_blocks`.
        batch: The rows.
        background: Linears that are replaced in every perturbation, unless it says otherwise. With the quantized
            forward of every linear here and one linear's own in a perturbation, what is measured is leaving this one
            unquantized. The reference is always the model without a background.
        tokens_at_once: Tokens of all tiles of a run together.

    Raises:
        Unsupported: A linear is not called exactly once on all tokens, or blocks do not run one after the other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Blocks,
        batch: Batch,
        background: Perturbation | None = None,
        tokens_at_once: int | None = None,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._background = dict(background or {})
        self._whole = not blocks.plain_head or blocks.head in self._background
        device = model.get_input_embeddings().weight.device
        self._tokens = tokens_at_once or _TOKENS_AT_ONCE[device.type]
        with torch.inference_mode():
            self._kept = [self._run_and_keep(s, {}) for s in batch.segments]
            self._references = [Reference(self._logits, kept.values, kept.targets) for kept in self._kept]
            if self._background:
                self._kept = [self._run_and_keep(s, self._background) for s in batch.segments]

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept."""
        feeds = sum(f.numel() * f.element_size() for kept in self._kept for f in kept.feeds)
        return feeds + sum(r.kept_bytes for r in self._references)

    @property
    def loss(self) -> float:
        """Loss of the model without a background on the batch, nats, summed over its loss tokens."""
        return sum(r.loss for r in self._references)

    def measure(self, perturbations: Sequence[Perturbation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Measures each perturbation alone.

        Args:
            perturbations: ``P`` of them; those that start in the same block and follow one another share a run.

        Returns:
            Per loss token, in the order of ``steps.loss_logits``: float32 ``[P, n]`` KL divergence of the perturbed
            from the unquantized prediction, nats, and float32 ``[P, n]`` change of the loss.
        """
        parts: list[list[torch.Tensor]] = []
        with torch.inference_mode():
            for kept, reference in zip(self._kept, self._references, strict=True):
                most = max(1, self._tokens // kept.segment.input_ids.numel())
                runs, measured = [], 0
                for tiles in self._together(perturbations, most):
                    runs.append(self._compare(kept, reference, tiles))
                    measured += len(tiles)
                    part_done((len(parts) + measured / len(perturbations)) / len(self._kept))
                parts.append([torch.cat(values) for values in zip(*runs, strict=True)])
        kl, change = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
        return kl, change

    def _together(self, perturbations: Sequence[Perturbation], most: int) -> Iterator[list[Perturbation]]:
        """Neighbours that start in the same block, as many as may run together."""
        if self._whole:
            most = 1  # the logits of all tiles would be too large
        for _, same in groupby(perturbations, key=lambda p: (self._start(p), self._blocks.head in p)):
            tiles = list(same)
            size = 1 if self._blocks.head in tiles[0] else most
            yield from (tiles[at : at + size] for at in range(0, len(tiles), size))

    def _start(self, perturbation: Perturbation) -> int:
        return min(self._blocks.of[name] for name in perturbation)

    def _compare(
        self, kept: _Kept, reference: Reference, tiles: list[Perturbation]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL divergence and loss change, ``[K, n]``."""
        values, whole = self._run(kept, tiles)
        size = max(1, LOGITS_AT_ONCE // (len(tiles) * reference.vocabulary))
        parts = []
        for at in range(0, values.shape[1], size):
            span = slice(at, at + size)
            logits = values[:, span]
            if not whole:
                logits = self._logits(logits.flatten(0, 1)).unflatten(0, (len(tiles), -1))
            parts.append(reference.compare(span, logits))
        kl, change = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        return kl, change

    def _run(self, kept: _Kept, tiles: list[Perturbation]) -> tuple[torch.Tensor, bool]:
        """Runs the suffix: ``[K, n, ...]`` hidden states or logits at the loss positions, and whether it is logits."""
        start = self._start(tiles[0])
        whole = self._whole or self._blocks.head in tiles[0]
        with self._skipped(kept, start, len(tiles)), self._replaced(kept, start, tiles):
            values, _ = self._predict(kept.segment.tiled(len(tiles)), whole)
        return values.unflatten(0, (len(tiles), -1)), whole

    def _logits(self, values: torch.Tensor) -> torch.Tensor:
        return self._model.get_output_embeddings()(values) if self._blocks.plain_head else values

    def _predict(self, segment: Segment, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (``whole``) or last hidden states at the loss positions, and the tokens that came true."""
        if whole:
            return predictions(self._model, segment)
        return last_hidden_states(self._model, segment)

    def _run_and_keep(self, segment: Segment, background: Perturbation) -> _Kept:
        """Runs the model as it is but for a background, and looks on."""
        blocks = self._blocks
        observer = _Observer()
        linears = {name: self._linear(name) for name in blocks.of if name != blocks.head}
        whole = not blocks.plain_head or blocks.head in background
        with observer.observing(blocks.modules, linears), forwards({self._linear(n): f for n, f in background.items()}):
            values, targets = self._predict(segment, whole)
        observer.check(len(blocks.modules), linears, segment.input_ids.numel())
        order = observer.order
        if blocks.head is not None:
            order[blocks.head] = len(order)
        return _Kept(segment, tuple(observer.feeds), observer.pack, order, values, targets)

    def _linear(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    @contextmanager
    def _skipped(self, kept: _Kept, start: int, tiles: int) -> Iterator[None]:
        """Blocks before ``start`` do nothing, and ``start`` gets what was kept for it, once per tile."""
        modules = self._blocks.modules

        def feed() -> torch.Tensor:
            fed = kept.feeds[start]
            return fed.repeat(tiles, *[1] * (fed.dim() - 1))

        def packed(hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
            return (hidden, *[None] * (kept.pack - 1)) if kept.pack else hidden

        def skipped(*args: torch.Tensor, **kwargs: torch.Tensor) -> object:
            return packed(_hidden(args, kwargs))

        patched: dict[nn.Module, Callable[..., object]] = dict.fromkeys(modules[:start], skipped)
        if start < len(modules):
            original = modules[start].forward

            def from_here(*args: object, **kwargs: object) -> object:
                if args:
                    return original(feed(), *args[1:], **kwargs)
                return original(**{**kwargs, "hidden_states": feed()})

            patched[modules[start]] = from_here
        elif modules:
            patched[modules[-1]] = lambda *_args, **_kwargs: packed(feed())
        with forwards(patched):
            yield

    @contextmanager
    def _replaced(self, kept: _Kept, start: int, tiles: list[Perturbation]) -> Iterator[None]:
        """Each tile gets its own linears, and shares the others."""
        of = self._blocks.of
        wanted = {n for tile in tiles for n in tile} | {n for n in self._background if of[n] >= start}
        if len(tiles) > 1:
            wanted |= {n for n in of if of[n] == start}  # here some tiles still share their input
        first = [min(kept.order[n] for n in tile) for tile in tiles]
        plans = {name: self._plan(name, kept.order[name], first, tiles) for name in wanted}
        with forwards({self._linear(name): by_tile(plan, len(tiles)) for name, plan in plans.items()}):
            yield

    def _plan(self, name: str, at: int, first: Sequence[int], tiles: Sequence[Perturbation]) -> list[Span]:
        """What computes a linear, tile by tile.

        Args:
            name: The linear.
            at: When it is called.
            first: When the first replaced linear of each tile is called: nothing before it differs between tiles.
            tiles: What each tile replaces.
        """
        own = self._background.get(name, self._linear(name).forward)
        plan: list[Span] = []
        for k, tile in enumerate(tiles):
            span = Span(k, k + 1, tile.get(name, own), shared=at < first[k])
            if plan and plan[-1].function is own and span.function is own and plan[-1].shared == span.shared:
                plan[-1] = replace(plan[-1], stop=span.stop)
            else:
                plan.append(span)
        return plan


class _Observer:
    """Sees what runs while the model runs once.

    Attributes:
        entered: Positions of the blocks, in the order in which they ran.
        feeds: The input of each block, and the output of the last.
        calls: Name of each linear that was called, in order, and its tokens.
        pack: Items of the tuple that a block returns, 0 where it returns its hidden states bare.
    """

    def __init__(self) -> None:
        self.entered: list[int] = []
        self.feeds: list[torch.Tensor] = []
        self.calls: list[tuple[str, int]] = []
        self.pack = 0

    @property
    def order(self) -> dict[str, int]:
        """Name of a linear → when it was called."""
        return {name: at for at, (name, _) in enumerate(self.calls)}

    @contextmanager
    def observing(self, blocks: Sequence[nn.Module], linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Looks on until the end of a ``with`` block."""
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                hook: Callable[..., None] = partial(self._enter, index)
                stack.enter_context(hooked(block.register_forward_pre_hook(hook, with_kwargs=True)))
            for name, linear in linears.items():
                hook = partial(self._call, name)
                stack.enter_context(hooked(linear.register_forward_pre_hook(hook, with_kwargs=True)))
            if blocks:
                stack.enter_context(hooked(blocks[-1].register_forward_hook(self._leave)))
            yield

    def check(self, blocks: int, linears: Iterable[str], tokens: int) -> None:
        """Makes sure that every block ran once, in order, and every linear once on all tokens.

        Raises:
            Unsupported: One did not.
        """
        if self.entered != list(range(blocks)):
            raise Unsupported(f"the blocks of the model do not run one after the other; {_USE_STOCK}")
        calls = dict(self.calls)
        for name in linears:
            times = sum(n == name for n, _ in self.calls)
            if times != 1 or calls[name] != tokens:
                why = f"called {times} times" if times != 1 else f"called with {calls[name]} of {tokens} tokens"
                raise Unsupported(f"{name} is {why} in a forward pass; leave it out with model.exclude=[{name}]")

    def _enter(self, index: int, _module: nn.Module, args: Arguments, kwargs: Mapping[str, torch.Tensor]) -> None:
        self.entered.append(index)
        self.feeds.append(_hidden(args, kwargs))

    def _call(self, name: str, module: nn.Module, args: Arguments, kwargs: Mapping[str, torch.Tensor]) -> None:
        self.calls.append((name, tokens_of(module, first_input(args, kwargs))))

    def _leave(self, _module: nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """The last block returns."""
        self.pack = len(output) if isinstance(output, tuple) else 0
        self.feeds.append(output[0] if isinstance(output, tuple) else output)


def _check(model: PreTrainedModel, blocks: Blocks, segment: Segment) -> None:
    """From every block on, a few tokens must be predicted as by the whole model, alone and in two tiles."""
    span = (slice(0, 1), slice(0, _PROBE))
    mask = torch.ones_like(segment.loss_mask[span])
    mask[:, 0] = False
    probe = Segment(segment.input_ids[span], None, mask, segment.sample[span])
    runner = SuffixRunner(model, blocks, Batch((probe,)))
    (kept,) = runner._kept
    with torch.inference_mode():
        expected = runner._logits(kept.values).double()
        tolerance = 1e-4 if kept.values.dtype == torch.float32 else 0.05
        names = {index: name for name, index in blocks.of.items()}
        for index, name in sorted(names.items()):
            own: Perturbation = {name: model.get_submodule(name).forward}
            for tiles in ([own],) if index == len(blocks.modules) else ([own], [own, own]):
                try:
                    values, whole = runner._run(kept, tiles)
                except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
                    raise Unsupported(
                        f"the model does not run from block {index} on ({cause}); {_USE_STOCK}"
                    ) from cause
                logits = (values if whole else runner._logits(values)).double()
                error = (logits - expected).norm(dim=(1, 2)).max()
                if not bool(error <= tolerance * expected.norm()):
                    raise Unsupported(
                        f"a run from block {index} on does not predict what a whole run does; {_USE_STOCK}"
                    )


def _hidden(args: Arguments, kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
