"""One scored module under observation: its quantizers, its ranges, and scores from the gradient of its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.linears import (
    QuantizableModule,
    by_token,
    features_last,
    is_convolution,
    outputs_of,
    run,
    shape_of,
    weight_of,
)
from layerbits.inputs.residence import device_of, own_dtype
from layerbits.scoring import quantizers
from layerbits.scoring.input_ranges import InputRange, RangeKind
from layerbits.scoring.memory import ModuleFootprint
from layerbits.scoring.patches import Forward
from layerbits.scoring.reduction import token_scores

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer

See = Callable[[str, torch.Tensor], None]
"""Takes the name of an input (``""`` where a module has one) and the tensor that came in."""


class Tap(ABC):
    """A scored module with the quantizers of every candidate; the module itself stays as it is.

    Args:
        name: Full name in the model.
        module: The module.
        settings: Distinct quantizer settings of ``C`` candidates.
        inputs: Names of what is quantized on the way through the module.
        device: Where it computes.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        settings: quantizers.QuantizerSettings,
        inputs: Sequence[str],
        device: torch.device,
    ) -> None:
        self.name = name
        self.module = module
        self.device = device
        self.inputs = {site: [quantizers.make_quantizer(s, device) for s in settings.inputs] for site in inputs}
        self.pairs = settings.pairs
        self.setting = (settings.weights[0], settings.inputs[0])
        self._headrooms = settings.headrooms

    @abstractmethod
    def footprint(self, tokens: int) -> ModuleFootprint:
        """What the module takes for a segment of some tokens."""

    @abstractmethod
    def observed(self, see: See) -> AbstractContextManager[None]:
        """While it lasts, a forward shows what is quantized to ``see``."""

    @abstractmethod
    def calibrate_weights(self, shared: torch.Tensor | None = None) -> None:
        """Finds the ranges of the weights.

        Args:
            shared: Largest magnitude of the weights that the module is fused with; its own by default.

        Raises:
            UserError: A weight is not finite.
        """

    def weight_quantizers(self) -> list[TensorQuantizer | None]:
        """Quantizers of the weight by setting, ``None`` = disabled; none where there are several weights."""
        return []

    @abstractmethod
    def keep_weights(self) -> None:
        """Keeps the quantized weights from one batch to the next."""

    @abstractmethod
    def drop_weights(self) -> None:
        """Quantizes the weights on the fly from now on."""

    @abstractmethod
    def inputs_of(self, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the scores need of the arguments of a forward."""

    @abstractmethod
    def scores(
        self, inputs: Sequence[torch.Tensor], output: torch.Tensor, gradient: torch.Tensor, signed: bool
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Candidates and their :func:`token_scores`, ``[n, tokens]``, until every candidate had its turn.

        Args:
            inputs: From :meth:`inputs_of`.
            output: Of the forward.
            gradient: Of the output.
            signed: Whether sums over output features stay signed and unsquared.
        """

    def fix_dtype(self, dtype: torch.dtype) -> None:
        """Has every quantizer compute in a dtype, whatever the module computes in from now on."""
        for row in (*self.inputs.values(), self.weight_quantizers()):
            for quantizer in row:
                quantizers.fix_dtype(quantizer, dtype)

    @abstractmethod
    def quantized(self, pair: tuple[int, int], keep: bool = False) -> Forward:
        """The forward under a pair of (weight, input) settings.

        Args:
            pair: Weight and input setting.
            keep: Whether to keep the quantized weights, in the module's own dtype; otherwise they are made in every
                forward.
        """

    @abstractmethod
    def recomputed(self) -> Forward:
        """The forward unquantized, summed in another order: what differs is rounding alone."""

    @abstractmethod
    def weights(self, setting: int | None) -> Iterator[torch.Tensor]:
        """The weight tensors, quantized by a setting or, with ``None``, as they are."""

    def lighter(self) -> AbstractContextManager[None]:
        """While it lasts, the module keeps less for its backward pass and computes the same."""
        return nullcontext()

    def range_names(self) -> Iterator[tuple[str, str, int, TensorQuantizer]]:
        """Name of a static range, input, setting and quantizer."""
        for site, row in self.inputs.items():
            for i, quantizer in enumerate(row):
                if quantizers.needs_range(quantizer):
                    yield f"{self.name}.{site}.{i}" if site else f"{self.name}.{i}", site, i, quantizer

    def range_kind(self, setting: int, quantizer: TensorQuantizer) -> RangeKind:
        """What the range of an input setting is."""
        return RangeKind.of(quantizer, self._headrooms[setting])

    def set_ranges(self, running: Mapping[str, Mapping[RangeKind, InputRange]]) -> None:
        """Takes the ranges that calibration found, by input and kind.

        Raises:
            UserError: The module was never called, or an input is not finite.
        """
        for _, site, i, quantizer in self.range_names():
            grown = running.get(site, {}).get(self.range_kind(i, quantizer))
            if grown is None:
                raise UserError(
                    f"{self.name} is never called in a forward pass; leave it out with model.exclude=[{self.name}]"
                )
            amax = grown.amax
            if not bool(torch.isfinite(amax).all()):
                raise UserError(f"the input of {self.name} is not finite; try model.dtype=float32 or bfloat16")
            quantizer.amax = amax


class LinearTap(Tap):
    """A linear, or a convolution over the tokens.

    Raises:
        Unsupported: A candidate has no meaning for a convolution.
    """

    module: QuantizableModule

    def __init__(self, name: str, module: QuantizableModule, settings: quantizers.QuantizerSettings) -> None:
        super().__init__(name, module, settings, [""], device_of(module))
        if is_convolution(module) and any(quantizer.axis is not None for _, _, _, quantizer in self.range_names()):
            raise Unsupported(
                f"{name} is a convolution, where a static scale per feature would be one per position; use a format "
                "with ModelOpt's exclusions, or another quant_granularity"
            )
        self._runs = _runs(settings)
        self._weights = [quantizers.make_quantizer(s, self.device) for s in settings.weights]
        self._searches = settings.searches
        self._kept: torch.Tensor | None = None

    def footprint(self, tokens: int) -> ModuleFootprint:
        """Input and output stay, and the weights and outputs of all settings are made side by side."""
        weight, (rows, width) = self.module.weight, shape_of(self.module)
        count, size = weight.numel(), weight.element_size()
        passing, outputs = 2 * count * size, tokens * rows * size
        kept = rows + width
        return ModuleFootprint(width, kept, kept, count, count, False, passing, outputs)

    def observed(self, see: See) -> AbstractContextManager[None]:
        """While it lasts, a forward shows the input to ``see``."""
        return hooked(self.module.register_forward_pre_hook(lambda _module, args: see("", args[0])))

    def calibrate_weights(self, shared: torch.Tensor | None = None) -> None:
        """Finds the ranges of the weight."""
        weight = _own_weight(self.module)
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"the weight of {self.name} is not finite; the checkpoint is damaged, fetch it again")
        for quantizer, search in zip(self._weights, self._searches, strict=True):
            quantizers.calibrate_weight(quantizer, weight, search, shared)

    def weight_quantizers(self) -> list[TensorQuantizer | None]:
        """Quantizers of the weight by setting."""
        return self._weights

    def keep_weights(self) -> None:
        """Keeps the quantized weights."""
        self._kept = self._all_weights()

    def drop_weights(self) -> None:
        """Quantizes the weight on the fly from now on."""
        self._kept = None

    def inputs_of(self, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The input."""
        return (first_input(args, kwargs),)

    def scores(
        self, inputs: Sequence[torch.Tensor], output: torch.Tensor, gradient: torch.Tensor, signed: bool
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Neighbouring weight settings of one input setting share a product."""
        (x,) = inputs
        module = self.module
        features, _ = shape_of(module)
        gradient, y = features_last(module, gradient), features_last(module, output)
        weights = self._all_weights() if self._kept is None else self._kept
        for setting, quantizer in enumerate(self.inputs[""]):
            seen = x if quantizer is None else quantizer(x)
            for first, last, candidates in self._runs[setting]:
                outputs = outputs_of(module, seen, weights[first * features : last * features], last - first)
                yield candidates, by_token(module, token_scores(gradient, outputs, y, signed), x)

    def quantized(self, pair: tuple[int, int], keep: bool = False) -> Forward:
        """The linear with quantized weight and input."""
        module, quantize_weight, quantize_input = self.module, self._weights[pair[0]], self.inputs[""][pair[1]]

        def quantized_weight() -> torch.Tensor:
            weight = _own_weight(module)
            return weight if quantize_weight is None else quantize_weight(weight)

        kept = quantized_weight().detach() if keep else None

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = quantized_weight() if kept is None else kept
            return run(module, x if quantize_input is None else quantize_input(x), weight.to(x.dtype))

        return forward

    def recomputed(self) -> Forward:
        """The linear in two halves of its input; a convolution in two halves of its width."""
        module = self.module
        half = shape_of(module)[1] // 2

        def linear(x: torch.Tensor) -> torch.Tensor:
            weight = weight_of(module)
            low = nn.functional.linear(x[..., :half], weight[:, :half], module.bias)
            return low + nn.functional.linear(x[..., half:], weight[:, half:])

        if not is_convolution(module):
            return linear

        def convolution(x: torch.Tensor) -> torch.Tensor:
            low = module.weight.clone()
            low[..., half:] = 0
            return run(module, x, low) + module._conv_forward(x, module.weight - low, None)

        return convolution

    def weights(self, setting: int | None) -> Iterator[torch.Tensor]:
        """The weight."""
        quantizer = None if setting is None else self._weights[setting]
        weight = weight_of(self.module).detach()
        yield weight if quantizer is None else quantizer(weight)

    def _all_weights(self) -> torch.Tensor:
        """The weights of all settings under each other, ``[W * out_features, in_features]``."""
        return torch.cat(list(self._under_all()))

    def _under_all(self) -> Iterator[torch.Tensor]:
        """The weight under every setting."""
        return (weight for setting in range(len(self._weights)) for weight in self.weights(setting))


@contextmanager
def hooked(handle: RemovableHandle) -> Iterator[None]:
    """Keeps a hook until the end of a ``with`` block."""
    try:
        yield
    finally:
        handle.remove()


def _own_weight(module: QuantizableModule) -> torch.Tensor:
    """The weight in its own dtype, whatever the model computes in."""
    weight = weight_of(module)
    return weight.to(own_dtype(module) or weight.dtype)


def first_input(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first argument of a forward, however it is given."""
    return args[0] if args else next(iter(kwargs.values()))


def _runs(settings: quantizers.QuantizerSettings) -> list[list[tuple[int, int, list[int]]]]:
    """Per input setting, runs of neighbouring weight settings: one matrix product serves all candidates of a run.

    Returns:
        (first weight setting, one past the last, positions of the candidates), lists of lists.
    """
    runs: list[list[tuple[int, int, list[int]]]] = []
    for setting in range(len(settings.inputs)):
        mine = sorted((w, c) for c, (w, i) in enumerate(settings.pairs) if i == setting)
        own: list[tuple[int, int, list[int]]] = []
        for w, c in mine:
            if own and own[-1][1] == w:
                own[-1] = (own[-1][0], w + 1, [*own[-1][2], c])
            else:
                own.append((w, w + 1, [c]))
        runs.append(own)
    return runs
