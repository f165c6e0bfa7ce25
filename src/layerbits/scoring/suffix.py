"""What replacing a few linears does to the predictions, at the price of the blocks behind them.

The model runs once and the input of every decoder block is kept. For a perturbation that starts in block ``b``, the
model runs again with the blocks before ``b`` skipped and the kept input fed to ``b``: embeddings, masks and rotary
tables stay the model's own business. Perturbations that start in the same block run side by side as tiles of one larger
batch, and until a tile reaches its first replaced linear it shares the linears of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from layerbits.errors import Unsupported
from layerbits.inputs.calibration import Batch, Segment
from layerbits.inputs.linears import tokens_of
from layerbits.inputs.models import output_head
from layerbits.progress import part_done
from layerbits.scoring.divergence import Reference
from layerbits.scoring.patches import Forward, Span, by_tile, forwards
from layerbits.scoring.steps import LOGITS_AT_ONCE, _inputs, _loss_positions, has_plain_head, predictions
from layerbits.scoring.tap import first_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS_AT_ONCE = {"cuda": 1 << 14, "cpu": 1 << 11}
"""Tokens of all tiles together: enough to fill the matrix units, few enough to keep the activations small."""
_PROBE = 8  # tokens that starting at a block is tried with
_MEND = "kl_div from block to block cannot score it, use autoquant.engine=stock"

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

    modules: tuple[Any, ...]
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
        found = next((p for p in prefixes if isinstance(model.get_submodule(p), torch.nn.ModuleList)), None)
        if found is None:
            raise Unsupported(f"{name} is in no list of decoder blocks; {_MEND}")
        lists.add(found)
        of[name] = int(parts[found.count(".") + 1])
    if len(lists) > 1:
        raise Unsupported(f"there are blocks in {' and '.join(sorted(lists))}; {_MEND}")
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
    feeds: tuple[Any, ...]
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

    def measure(self, perturbations: Sequence[Perturbation]) -> tuple[Any, Any]:
        """Measures each perturbation alone.

        Args:
            perturbations: ``P`` of them; those that start in the same block and follow one another share a run.

        Returns:
            Per loss token, in the order of ``steps.loss_logits``: float32 ``[P, n]`` KL divergence of the perturbed
            from the unquantized prediction, nats, and float32 ``[P, n]`` change of the loss.
        """
        parts: list[list[Any]] = []
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

    def _compare(self, kept: _Kept, reference: Reference, tiles: list[Perturbation]) -> tuple[Any, Any]:
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

    def _run(self, kept: _Kept, tiles: list[Perturbation]) -> tuple[Any, bool]:
        """Runs the suffix: ``[K, n, ...]`` hidden states or logits at the loss positions, and whether it is logits."""
        start = self._start(tiles[0])
        whole = self._whole or self._blocks.head in tiles[0]
        with self._skipped(kept, start, len(tiles)), self._replaced(kept, start, tiles):
            values, _ = self._predict(kept.segment.tiled(len(tiles)), whole)
        return values.unflatten(0, (len(tiles), -1)), whole

    def _logits(self, values: torch.Tensor) -> Any:
        return self._model.get_output_embeddings()(values) if self._blocks.plain_head else values

    def _predict(self, segment: Segment, whole: bool) -> tuple[Any, Any]:
        """Logits (``whole``) or last hidden states at the loss positions, and the tokens that came true."""
        if whole:
            return predictions(self._model, segment)
        inputs = _inputs(self._model, segment)
        return _loss_positions(self._model.base_model(**inputs).last_hidden_state, inputs["input_ids"], segment)

    def _run_and_keep(self, segment: Segment, background: Perturbation) -> _Kept:
        """Runs the model as it is but for a background, and looks on."""
        blocks = self._blocks
        seen: list[int] = []
        feeds: list[Any] = []
        outputs: list[Any] = []
        called: list[tuple[str, int]] = []

        def before_block(index: int) -> Any:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append(index)
                feeds.append(_hidden(args, kwargs))

            return hook

        def before_linear(name: str) -> Any:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = first_input(args, kwargs)
                called.append((name, tokens_of(_module, x)))

            return hook

        def after_last(_module: Any, _args: Any, output: torch.Tensor) -> None:
            outputs.append(output)

        handles = [m.register_forward_pre_hook(before_block(i), with_kwargs=True) for i, m in enumerate(blocks.modules)]
        handles += [
            self._linear(n).register_forward_pre_hook(before_linear(n), with_kwargs=True)
            for n in blocks.of
            if n != blocks.head
        ]
        if blocks.modules:
            handles.append(blocks.modules[-1].register_forward_hook(after_last))
        try:
            with forwards({self._linear(n): f for n, f in background.items()}):
                values, targets = self._predict(segment, not blocks.plain_head or blocks.head in background)
        finally:
            for handle in handles:
                handle.remove()
        if seen != list(range(len(blocks.modules))):
            raise Unsupported(f"the blocks of the model do not run one after the other; {_MEND}")
        calls = dict(called)
        tokens = segment.input_ids.numel()
        for name in blocks.of:
            times = sum(n == name for n, _ in called)
            if name != blocks.head and (times != 1 or calls[name] != tokens):
                why = f"called {times} times" if times != 1 else f"called with {calls[name]} of {tokens} tokens"
                raise Unsupported(f"{name} is {why} in a forward pass; leave it out with model.exclude=[{name}]")
        order = {name: at for at, (name, _) in enumerate(called)}
        if blocks.head is not None:
            order[blocks.head] = len(order)
        pack = len(outputs[0]) if outputs and isinstance(outputs[0], tuple) else 0
        last = [o[0] if pack else o for o in outputs]
        return _Kept(segment, (*feeds, *last), pack, order, values, targets)

    def _linear(self, name: str) -> Any:
        return self._model.get_submodule(name)

    @contextmanager
    def _skipped(self, kept: _Kept, start: int, tiles: int) -> Iterator[None]:
        """Blocks before ``start`` do nothing, and ``start`` gets what was kept for it, once per tile."""
        modules = self._blocks.modules

        def feed() -> Any:
            fed = kept.feeds[start]
            return fed.repeat(tiles, *[1] * (fed.dim() - 1))

        def packed(hidden: torch.Tensor) -> Any:
            return (hidden, *[None] * (kept.pack - 1)) if kept.pack else hidden

        patched: dict[Any, Any] = {m: lambda *args, **kwargs: packed(_hidden(args, kwargs)) for m in modules[:start]}
        if start < len(modules):
            original = modules[start].forward

            def from_here(*args: Any, **kwargs: Any) -> Any:
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
        patched = {}
        for name in wanted:
            module = self._linear(name)
            own = self._background.get(name, module.forward)
            plan: list[Span] = []
            for k, tile in enumerate(tiles):
                shared = kept.order[name] < first[k]  # nothing before it was replaced in this tile
                function = tile.get(name, own)
                if plan and plan[-1].function is own and function is own and plan[-1].shared == shared:
                    plan[-1] = replace(plan[-1], stop=k + 1)
                else:
                    plan.append(Span(k, k + 1, function, shared))
            patched[module] = by_tile(plan, len(tiles))
        with forwards(patched):
            yield


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
                    raise Unsupported(f"the model does not run from block {index} on ({cause}); {_MEND}") from cause
                logits = (values if whole else runner._logits(values)).double()
                error = (logits - expected).norm(dim=(1, 2)).max()
                if not bool(error <= tolerance * expected.norm()):
                    raise Unsupported(f"a run from block {index} on does not predict what a whole run does; {_MEND}")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]
