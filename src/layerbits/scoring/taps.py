"""The scored modules under observation: ranges, quantized weights, and scores as gradients arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from layerbits.candidates.fused import fused
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Batch
from layerbits.inputs.experts import fused_experts
from layerbits.inputs.linears import is_quantizable, tokens_of
from layerbits.progress import progress
from layerbits.results.assignment import IntArray
from layerbits.scoring import quantizers
from layerbits.scoring.batch_scores import BatchScores, Recorder, check_called
from layerbits.scoring.experts import ExpertsTap, Routed
from layerbits.scoring.features import in_tower
from layerbits.scoring.input_ranges import InputRange, RangeKind
from layerbits.scoring.memory import ModuleFootprint
from layerbits.scoring.modality import ImageInputs
from layerbits.scoring.saved import Saved
from layerbits.scoring.steps import Labels, calibration_forward, first_tokens, loss_backward
from layerbits.scoring.tap import LinearTap, Tap, first_input, hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Arguments = tuple[torch.Tensor, ...]
"""What a module is called with by position."""
Hook = Callable[[nn.Module, Arguments, dict[str, torch.Tensor], torch.Tensor], None]
"""Runs behind a forward: the module, its arguments and its output."""


def make_tap(name: str, module: nn.Module, settings: quantizers.QuantizerSettings) -> Tap:
    """A tap of the kind that a module needs.

    Args:
        name: Full name in the model.
        module: A linear or an expert module.
        settings: Distinct quantizer settings of the candidates.

    Raises:
        Unsupported: A module of another kind.
    """
    if is_quantizable(module):
        return LinearTap(name, module, settings)
    experts = fused_experts(module)
    if experts is None:
        kind = type(module).__name__
        raise Unsupported(f"{name} is a {kind}; one pass scores linears and experts, use autoquant.engine=stock")
    return ExpertsTap(name, module, settings, experts)


class Taps:
    """Hooks on the scored modules of a model; the model itself stays as it is.

    Args:
        model: The whole model.
        names: Its scored modules (``M`` of them).
        settings: Distinct quantizer settings of ``C`` candidates.

    Attributes:
        keep_weights: Whether to keep the quantized weights of linears from one batch to the next.
        keep_experts: Those of experts, which are most of a model that has them.
        images: What calibration saw of inputs at image positions.

    Raises:
        Unsupported: A scored module is neither a linear nor an expert module.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], settings: quantizers.QuantizerSettings) -> None:
        self.model = model
        self.taps = [make_tap(name, model.get_submodule(name), settings) for name in names]
        self._pairs = settings.pairs
        self._share_ranges = settings.share_ranges
        self.keep_weights = self.keep_experts = False
        self._copied: set[int] = set()
        self._tower = set(in_tower(model, names))
        self.images = ImageInputs()

    def footprints(self, tokens: int, patches: int = 0) -> list[ModuleFootprint]:
        """What each module takes for a segment.

        Args:
            tokens: Of the segment.
            patches: Of its pictures: what a vision tower's modules see instead.
        """
        if not patches:
            return [tap.footprint(tokens) for tap in self.taps]
        return [
            self._of_patches(tap, tokens, patches) if tap.name in self._tower else tap.footprint(tokens)
            for tap in self.taps
        ]

    @staticmethod
    def _of_patches(tap: Tap, tokens: int, patches: int) -> ModuleFootprint:
        found = tap.footprint(patches)
        per_token = [-(-n * patches // tokens) for n in (found.kept, found.moved)]  # rounded up
        return replace(found, kept=per_token[0], moved=per_token[1])

    def calibrate(self, batches: Sequence[Batch], need_logits: bool, pictured: bool = False) -> None:
        """Finds the static input ranges, all of them in one forward over the batches.

        Args:
            batches: The rows.
            need_logits: Whether the output head is scored.
            pictured: Whether to tell inputs at image positions from those at words, too.

        Raises:
            UserError: An input is not finite.
        """
        kinds = {tap.range_kind(i, quantizer) for tap in self.taps for _, _, i, quantizer in tap.range_names()}
        if not kinds or not batches:  # a process of a torchrun may have none
            return
        running: list[dict[str, dict[RangeKind, InputRange]]] = [{} for _ in self.taps]
        latest = _LatestRanges(kinds)
        self.images = images = ImageInputs(pictured)

        def see(index: int, site: str, x: torch.Tensor) -> None:
            ranges = latest.of(x)
            images.see(self.taps[index], site, x)
            known = running[index].setdefault(site, {})
            for kind, new in ranges.items():
                known[kind] = known[kind].join(new) if kind in known else new

        with ExitStack() as stack, torch.no_grad():
            for index, tap in enumerate(self.taps):
                stack.enter_context(tap.observed(partial(see, index)))
            for batch in progress(batches, "calibrating"):
                for segment in batch.segments:
                    images.enter(segment)
                    calibration_forward(self.model, Batch((segment,)), need_logits)
        unseen = [tap.name for tap, known in zip(self.taps, running, strict=True) if not known]
        check_called([tap.name for tap in self.taps if tap.name in unseen and any(True for _ in tap.range_names())])
        for tap, known in zip(self.taps, running, strict=True):
            tap.set_ranges(known)

    def take_routed(self) -> dict[str, IntArray]:
        """Tokens per expert that were counted since the last call, by name of the expert module."""
        return {tap.name: tap.take_routed() for tap in self.taps if isinstance(tap, ExpertsTap)}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While it lasts, forwards of the model count the tokens of each expert."""

        def see(tap: ExpertsTap) -> Callable[..., None]:
            def hook(_module: nn.Module, args: Arguments, kwargs: dict[str, torch.Tensor]) -> None:
                tap.count(Routed.of(args, kwargs).index)

            return hook

        with ExitStack() as stack:
            for tap in self.taps:
                if isinstance(tap, ExpertsTap):
                    stack.enter_context(hooked(tap.module.register_forward_pre_hook(see(tap), with_kwargs=True)))
            yield

    def ranges(self) -> dict[str, npt.NDArray[np.float32]]:
        """Static input ranges as float32 arrays by name."""
        return {
            name: quantizer.amax.float().cpu().numpy()
            for tap in self.taps
            for name, _, _, quantizer in tap.range_names()
            if quantizer.amax is not None
        }

    def load_ranges(self, ranges: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Takes the ranges of :meth:`ranges` and finds those of the weights.

        Raises:
            UserError: A weight is not finite.
        """
        with torch.no_grad():
            plain = ((tap.name, next(tap.weights(None))) for tap in self.taps)
            shared = quantizers.shared_largest(plain) if self._share_ranges else {}
            for tap in self.taps:
                tap.calibrate_weights(shared.get(tap.name))
            self._share_weight_ranges()
            for tap in self.taps:
                dtype = next(tap.module.parameters()).dtype
                for name, _, _, quantizer in tap.range_names():
                    quantizer.amax = torch.as_tensor(ranges[name]).to(device=tap.device, dtype=dtype)
                if self.keep_experts if isinstance(tap, ExpertsTap) else self.keep_weights:
                    tap.keep_weights()

    def fix_dtypes(self) -> None:
        """Has every quantizer compute in the dtype that its module has now, whatever it computes in afterwards."""
        for tap in self.taps:
            tap.fix_dtype(next(tap.module.parameters()).dtype)

    def _share_weight_ranges(self) -> None:
        by_name = {tap.name: tap.weight_quantizers() for tap in self.taps}
        for names in fused(by_name):
            for row in zip(*(by_name[name] for name in names), strict=True):
                quantizers.share_ranges(row)

    def drop_weights(self) -> None:
        """Frees the kept weights; from then on weights are quantized on the fly."""
        self.keep_weights = self.keep_experts = False
        for tap in self.taps:
            tap.drop_weights()

    def score(self, batch: Batch, chunked: bool, labels: Labels | None = None, recomputed: bool = False) -> BatchScores:
        """Scores one batch.

        Args:
            batch: The rows.
            chunked: Whether to make the logits in pieces.
            recomputed: Whether gradient checkpointing is on.
            labels: Takes the loss for these tokens, and leaves the sums over output features signed and unsquared.

        Raises:
            UserError: A module is not called in a forward, or not on every token.
        """
        recorder = Recorder(self.taps, len(self._pairs), batch, self._tower, signed=labels is not None)
        given = {} if labels is None else {"labels": labels}
        with self._observed(recorder, recomputed):
            loss = loss_backward(self.model, batch, recorder.next_segment, chunked, **given)
        owner = torch.cat([s.sample.flatten() for s in batch.segments])
        return BatchScores(recorder.by_token, owner, float(loss))

    @contextmanager
    def _observed(self, recorder: Recorder, recomputed: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(activation_gradients(self.model))
            for index, tap in enumerate(self.taps):
                hook = self._hook(index, recorder, recomputed)
                stack.enter_context(hooked(tap.module.register_forward_hook(hook, with_kwargs=True)))
                stack.enter_context(tap.lighter())
            yield

    def _hook(self, index: int, recorder: Recorder, recomputed: bool) -> Hook:
        """Saves what a call of a module is scored by, until its gradient comes."""
        tap, copied = self.taps[index], index in self._copied

        def hook(_module: nn.Module, args: Arguments, kwargs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
            tokens = tokens_of(tap.module, first_input(args, kwargs))
            # else an expert of its own, say: which tokens these are cannot be known here
            if tokens != recorder.tokens and tap.name not in self._tower:
                raise UserError(
                    f"{tap.name} is called on {tokens} of {recorder.tokens} tokens in a forward pass; "
                    f"leave it out with model.exclude=[{tap.name}]"
                )
            if output.requires_grad:
                tensors = (*tap.inputs_of(args, kwargs), output)
                saved = Saved([t.clone() for t in tensors] if copied else tensors, recomputed)
                output.register_hook(lambda gradient: add(saved, gradient))

        def add(saved: Saved, gradient: torch.Tensor) -> None:
            *inputs, output = saved.take()  # the graph outlives this hook, the tensors need not
            recorder.add(index, inputs, output, gradient)

        return hook

    def copy_what_changes(self, batch: Batch) -> None:
        """Finds the modules whose inputs or output the model changes after their forward (Falcon's MLP).

        From then on copies of these wait for the gradient.

        Args:
            batch: Rows, of which the first tokens are tried.
        """
        seen: dict[int, list[tuple[torch.Tensor, int]]] = {}

        def see(index: int) -> Hook:
            tap = self.taps[index]

            def hook(
                _module: nn.Module, args: Arguments, kwargs: dict[str, torch.Tensor], output: torch.Tensor
            ) -> None:
                tensors = (*tap.inputs_of(args, kwargs), output)
                seen.setdefault(index, []).extend((t.detach(), t._version) for t in tensors)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for index, tap in enumerate(self.taps):
                stack.enter_context(hooked(tap.module.register_forward_hook(see(index), with_kwargs=True)))
            calibration_forward(self.model, first_tokens(batch), need_logits=True)
        self._copied = {i for i, tensors in seen.items() if any(t._version != version for t, version in tensors)}


class _LatestRanges:
    """Ranges of the tensor that came last: fused linears share one input, whose ranges are found once.

    Args:
        kinds: The ranges that are wanted.
    """

    def __init__(self, kinds: Iterable[RangeKind]) -> None:
        self._kinds = tuple(kinds)
        self._tensor: torch.Tensor | None = None
        self._ranges: dict[RangeKind, InputRange] = {}

    def of(self, x: torch.Tensor) -> Mapping[RangeKind, InputRange]:
        """By kind."""
        if self._tensor is not x:
            self._tensor, self._ranges = x, {kind: InputRange(kind, x) for kind in self._kinds}
        return self._ranges


@contextmanager
def activation_gradients(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, activations get gradients and parameters none; those would cost a third of the backward pass."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with hooked(embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
