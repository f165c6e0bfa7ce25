"""Expert modules under observation: all experts of a module are one decision, scored at the module's output.

A module gets hidden states, the experts that each token is routed to, and the weights of the routing. These are data:
a candidate's output is made on the recorded routing with every expert's weights quantized, the token's input quantized
before the first projection and the activations between before the second. ModelOpt computes the same expert by expert
in Python (``_QuantFusedExperts``); here the tokens of all experts go through one grouped product
(``experts_implementation="grouped_mm"`` of transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from layerbits.errors import Unsupported
from layerbits.inputs.experts import Experts
from layerbits.inputs.residence import resident
from layerbits.scoring import quantizers
from layerbits.scoring.expert_weights import AT_ONCE, ExpertWeights, largest_by_row
from layerbits.scoring.grouped import SideBySide, goes_side_by_side
from layerbits.scoring.memory import ModuleFootprint
from layerbits.scoring.patches import Forward, forwards
from layerbits.scoring.reduction import token_scores
from layerbits.scoring.tap import See, Tap

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k", "num_selected_experts")
"""Names of the number of experts per token in configurations, ModelOpt's list (``_auto_quantize_cost.py``)."""

_ROWS_AT_ONCE = 1 << 15
"""Routed tokens of several candidates that go side by side: two candidates of 2,048 tokens with eight experts each."""

Change = Callable[[torch.Tensor], torch.Tensor]
"""What is done to a tensor on its way into a projection."""


@dataclass(frozen=True)
class Routed:
    """What enters an expert module.

    Attributes:
        hidden: ``[tokens, features]``. index: ``[tokens, k]`` experts of each token. weights: ``[tokens, k]``.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> Routed:
        """Reads the arguments of a forward; transformers gives them in this order under several names."""
        return cls(*(v.detach() for v in (*args, *kwargs.values())))


class ExpertsTap(Tap):
    """An expert module.

    Args:
        name: Full name in the model.
        module: The module.
        settings: Distinct quantizer settings of the candidates.
        experts: What it consists of.
    """

    def __init__(self, name: str, module: nn.Module, settings: quantizers.QuantizerSettings, experts: Experts) -> None:
        tensors = [getattr(resident(module), projection) for projection in experts.projections]
        super().__init__(name, module, settings, experts.projections, tensors[0].device)
        self.experts = experts
        searches = settings.searches or (None,) * len(settings.weights)
        self._weights = [
            [None if setting is None else ExpertWeights(setting, tensor, search) for tensor in tensors]
            for setting, search in zip(settings.weights, searches, strict=True)
        ]
        self._kept: list[tuple[torch.Tensor, ...]] | None = None
        self._routed = _zeros(experts.count + 1, self.device)

    def count(self, index: torch.Tensor) -> None:
        """Counts the tokens of each expert.

        Args:
            index: ``[tokens, k]`` experts of each token; a number beyond the last stands for none.
        """
        flat = index.flatten().clamp(max=self.experts.count).to(self.device)
        self._routed.index_add_(0, flat, self._routed.new_ones(()).expand(len(flat)))

    def take_routed(self) -> npt.NDArray[np.int64]:
        """Tokens per expert that were counted since the last call, ``[experts]`` on the CPU."""
        counted = self._routed[:-1].cpu().numpy()
        self._routed = _zeros(self.experts.count + 1, self.device)
        return counted

    def fix_dtype(self, dtype: torch.dtype) -> None:
        """Has every quantizer compute in a dtype."""
        super().fix_dtype(dtype)
        for row in self._weights:
            for quantizer in row:
                if quantizer is not None:
                    quantizer.dtype = dtype

    def footprint(self, tokens: int) -> ModuleFootprint:
        """Input and output stay; one setting's quantized weights and the routed tokens pass."""
        (between, width), (features, inner) = self.experts.shapes
        size = self._tensors()[0].element_size()
        count, met = self.experts.weights, min(self.experts.count, self._per_token())
        routed = max(_ROWS_AT_ONCE, tokens * met)
        passing = count * size + 12 * AT_ONCE  # three float32 tensors on the way
        of_routed = 2 * width + between + inner + 2 * features
        outputs = routed * of_routed * size
        active = count * met // self.experts.count
        kept = width + features
        return ModuleFootprint(width, kept, kept + met * of_routed, count, active, True, passing, outputs)

    def observed(self, see: See) -> AbstractContextManager[None]:
        """While it lasts, a forward shows what enters the two projections to ``see``."""
        first, second = self.experts.projections

        def show(site: str) -> Change:
            def shown(x: torch.Tensor) -> torch.Tensor:
                see(site, x)
                return x

            return shown

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            routed = Routed.of(args, kwargs)
            self.count(routed.index)
            return self._run(routed, self._tensors(), show(first), show(second))

        return forwards({self.module: forward})

    def calibrate_weights(self, shared: torch.Tensor | None = None) -> None:
        """Finds the ranges of all experts' weights."""
        for position, tensor in enumerate(self._tensors()):
            amax = largest_by_row(self.name, tensor)
            for row in self._weights:
                if (quantizer := row[position]) is not None:
                    quantizer.calibrate(tensor, amax)

    def keep_weights(self) -> None:
        """Keeps the quantized weights of all experts."""
        self._kept = [tuple(self.weights(setting)) for setting in range(len(self._weights))]

    def drop_weights(self) -> None:
        """Quantizes them on the fly from now on."""
        self._kept = None

    def inputs_of(self, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The routed tokens."""
        routed = Routed.of(args, kwargs)
        return routed.hidden, routed.index, routed.weights

    def scores(
        self, inputs: Sequence[torch.Tensor], output: torch.Tensor, gradient: torch.Tensor, signed: bool
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Candidates with the same weight setting share its quantized weights; counts the tokens of each expert."""
        routed = Routed(*inputs)
        self.count(routed.index)
        self._check(routed)
        ready: dict[tuple[int, ...], SideBySide] = {}
        for weight in range(len(self._weights)):
            mine: dict[int, list[int]] = {}
            for candidate, pair in enumerate(self.pairs):
                if pair[0] == weight:
                    mine.setdefault(pair[1], []).append(candidate)
            if not mine:
                continue
            tensors = tuple(self.weights(weight)) if self._kept is None else self._kept[weight]
            for setting, changed in self._outputs(routed, tensors, list(mine), ready):
                yield mine[setting], token_scores(gradient, changed, output, signed)

    def _outputs(
        self,
        routed: Routed,
        tensors: Sequence[torch.Tensor],
        settings: Sequence[int],
        ready: dict[tuple[int, ...], SideBySide],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Output under each input setting; where tokens may go side by side, the weights are read once for several.

        Args:
            routed: What enters.
            tensors: The weights of the two projections.
            settings: Input settings.
            ready: Tokens that were sorted for other weights, by their settings; takes what is sorted here.
        """
        changes = {setting: self._changes(setting) for setting in settings}
        if not (goes_side_by_side(self.module) and all(_by_token(c) for pair in changes.values() for c in pair)):
            for setting in settings:
                yield setting, self._run(routed, tensors, *changes[setting])
            return
        size = max(1, _ROWS_AT_ONCE // routed.index.numel())
        for at in range(0, len(settings), size):
            several = tuple(settings[at : at + size])
            if several not in ready:
                firsts = [changes[setting][0] for setting in several]
                hidden = [routed.hidden if first is None else first(routed.hidden) for first in firsts]
                ready[several] = SideBySide(self.module, self.experts.count, hidden, routed.index, routed.weights)
            outputs = ready[several].outputs(tensors, [changes[setting][1] for setting in several])
            yield from zip(several, outputs, strict=True)

    def quantized(self, pair: tuple[int, int], keep: bool = False) -> Forward:
        """The module with quantized experts and inputs."""
        kept = tuple(self.weights(pair[0])) if keep else None

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            weights = tuple(self.weights(pair[0])) if kept is None else kept
            routed = Routed(*args, *kwargs.values())  # gradients pass where the module is held quantized
            return self._run(routed, weights, *self._changes(pair[1]))

        return forward

    def recomputed(self) -> Forward:
        """Each half of a token's experts for itself."""

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            routed = Routed.of(args, kwargs)
            first = routed.weights.clone()
            first[:, routed.weights.shape[1] // 2 :] = 0
            parts = (first, routed.weights - first)
            low, high = (self._run(Routed(routed.hidden, routed.index, w), self._tensors()) for w in parts)
            return low + high

        return forward

    def weights(self, setting: int | None) -> Iterator[torch.Tensor]:
        """The two projections' weights."""
        for position, tensor in enumerate(self._tensors()):
            quantizer = None if setting is None else self._weights[setting][position]
            yield tensor if quantizer is None else quantizer(tensor)

    def weight_range(
        self, projection: str, expert: int, start: int, stop: int, setting: int = 0
    ) -> torch.Tensor | None:
        """Range of some rows of an expert's weight as a setting has it, ``None`` where it needs none."""
        quantizer = self._weights[setting][self.experts.projections.index(projection)]
        return None if quantizer is None else quantizer.range_of(expert, start, stop)

    def lighter(self) -> AbstractContextManager[None]:
        """While it lasts, the activations inside the module are made again in the backward pass."""

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            hidden, index, weights = (*args, *kwargs.values())
            return _Recomputed.apply(hidden, weights, index, self._plain)

        return forwards({self.module: forward})

    def with_inputs(self, changes: Mapping[str, Change]) -> Forward:
        """The module as it is but for what enters its projections.

        Args:
            changes: Name of a projection → what is done to its input.
        """
        first, second = (changes.get(projection) for projection in self.experts.projections)
        return lambda *args, **kwargs: self._run(Routed.of(args, kwargs), self._tensors(), first, second)

    def _per_token(self) -> int:
        """Experts of a token, as many as the configuration says."""
        config = getattr(self.module, "config", None)
        return next((n for n in (getattr(config, a, None) for a in _PER_TOKEN) if isinstance(n, int)), 8)

    def _plain(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._run(Routed(hidden, index, weights), self._tensors())

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(resident(self.module), projection).detach() for projection in self.experts.projections)

    def _changes(self, setting: int) -> tuple[Change | None, ...]:
        return tuple(self.inputs[projection][setting] for projection in self.experts.projections)

    def _run(
        self,
        routed: Routed,
        tensors: Sequence[torch.Tensor],
        first: Change | None = None,
        second: Change | None = None,
    ) -> torch.Tensor:
        """The module's output with other weights, its inputs changed on the way.

        Args:
            routed: What enters.
            tensors: The weights of the two projections.
            first: Applied to what enters the first projection.
            second: Applied to what enters the second.
        """
        self._check(routed)
        tensors = [t.to(routed.hidden.dtype) for t in tensors]  # kept ones may be narrower than what is computed in
        weights = dict(zip(self.experts.projections, tensors, strict=True))
        grouped = _grouped(self.module)
        if grouped is None or not (_by_token(first) and _by_token(second)):
            return _one_by_one(self.module, weights, routed, first, second)
        gate = "_apply_gate" if self.module.has_gate else "act_fn"
        act = getattr(self.module, gate)
        between = act if second is None else lambda x: second(act(x))
        hidden = routed.hidden if first is None else first(routed.hidden)
        return grouped(_With(self.module, {**weights, gate: between}), hidden, routed.index, routed.weights)

    def _check(self, routed: Routed) -> None:
        if routed.hidden.dim() != 2 or routed.index.dim() != 2:
            raise Unsupported(
                f"{self.name} gets {routed.hidden.dim()}-dimensional hidden states; use autoquant.engine=stock"
            )


class _With:
    """A module with some attributes replaced, for its forward as a plain function."""

    def __init__(self, module: nn.Module, replaced: Mapping[str, object]) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64, device=device)


def _grouped(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Transformers' grouped forward, ``None`` for a class that was not written for it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"] if hasattr(module, "has_gate") else None


def _by_token(change: Change | None) -> bool:
    """Whether a change treats every token by itself, so that it may be applied to the tokens of all experts at once."""
    return change is None or not hasattr(change, "block_sizes") or quantizers.by_token(change)


def _one_by_one(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    routed: Routed,
    first: Change | None,
    second: Change | None,
) -> torch.Tensor:
    """The module's own loop over its experts, ``torch.nn.functional.linear`` called twice for each.

    ModelOpt's way: a range that is made on the fly is that of the tokens of one expert.
    """
    own = type(module).forward
    forward = getattr(own, "__wrapped__", own)
    with _linear_is(_InTurn(nn.functional.linear, first, second)):
        return forward(_With(module, weights), routed.hidden, routed.index, routed.weights)


class _InTurn:
    """A linear for a loop over experts, which calls it with the two projections of each expert in turn.

    Args:
        linear: What it computes with.
        first: What is done to the input of the first projection. second: Of the second.
    """

    def __init__(self, linear: Callable[..., torch.Tensor], first: Change | None, second: Change | None) -> None:
        self._linear = linear
        self._changes = cycle((first, second))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        change = next(self._changes)
        return self._linear(x if change is None else change(x), weight, bias)


@contextmanager
def _linear_is(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    before = torch.nn.functional.linear
    torch.nn.functional.linear = function
    try:
        yield
    finally:
        torch.nn.functional.linear = before


class _Context(Protocol):
    """What autograd hands to :class:`_Recomputed`, with what that keeps beside tensors."""

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Keeps tensors."""


class _Recomputed(torch.autograd.Function):
    """Keeps what enters, and makes the inside again when the gradient comes."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weights, index)
        ctx.run = run
        return run(hidden, index, weights)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weights, index = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [hidden.detach().requires_grad_(), weights.detach().requires_grad_()]
            output = ctx.run(leaves[0], index, leaves[1])
            wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
            gradients = iter(torch.autograd.grad(output, wanted, gradient))
        return (*(next(gradients) if needed else None for needed in ctx.needs_input_grad[:2]), None, None)
