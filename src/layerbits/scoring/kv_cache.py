"""Keys and values quantized on their way into the attention of a language model; the model itself stays as it is.

Transformers' attention modules fetch the function that computes attention from one registry; while a cache is in
force, what they get quantizes keys and values first, where ModelOpt's ``k_bmm_quantizer`` and ``v_bmm_quantizer`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from layerbits.candidates import backends
from layerbits.candidates.kv_cache import KV_FORMATS
from layerbits.errors import UserError
from layerbits.inputs.calibration import Batch
from layerbits.inputs.residence import own_dtype
from layerbits.scoring import quantizers
from layerbits.scoring.reduction import token_scores
from layerbits.scoring.saved import Saved
from layerbits.scoring.steps import calibration_forward

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import TensorQuantizer
    from transformers import PreTrainedModel

Attention = Callable[..., tuple[torch.Tensor, ...]]
"""Takes the attention module, queries, keys, values, the mask and keyword arguments."""
KeysAndValues = tuple[torch.Tensor, torch.Tensor]
Wrap = Callable[[Attention], Attention]
KvRanges = Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]]
"""Name of an attention module → largest magnitude of its keys and of its values, ``None`` where a format needs none."""

_WRAPS: list[Wrap] = []


class KvCache:
    """A quantized KV cache of a model.

    Args:
        model: The whole model, unquantized.
        settings: Of the quantizers of keys and values.
        language_model: Name of the language model's module; attention elsewhere keeps no cache.
    """

    def __init__(self, model: PreTrainedModel, settings: Mapping[str, object], language_model: str = "") -> None:
        from modelopt.torch.quantization.config import QuantizerAttributeConfig

        self._model = model
        prefix = f"{language_model}." if language_model else ""
        self._names = {m: n for n, m in model.named_modules() if n.startswith(prefix)}
        device = next(model.parameters()).device
        if device.type != "cuda":
            backends.register_backends()
            entries = [{"quantizer_name": "*", "cfg": dict(settings)}]
            settings = backends.with_reference_backend({"quant_cfg": entries})["quant_cfg"][0]["cfg"]
        self._attributes = QuantizerAttributeConfig.model_validate(settings)
        self._quantizers_of: dict[nn.Module, tuple[TensorQuantizer, TensorQuantizer]] = {}

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Finds the ranges in one forward over the batches.

        Raises:
            UserError: No attention of the language model is known to transformers' registry.
        """

        def watch(module: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
            for quantizer, x in zip(self._quantizers(module), (keys, values), strict=True):
                if _ranged(quantizer):
                    amax = quantizers.largest(x, quantizer.axis)
                    known = quantizer.amax
                    quantizer.amax = amax if known is None else torch.maximum(known, amax)
            return keys, values

        with torch.no_grad(), attention(self._wrapped(watch)):
            for batch in batches:
                calibration_forward(self._model, batch, need_logits=False)
        if not self._quantizers_of:
            kind = type(self._model).__name__
            raise UserError(f"no attention of {kind} goes through transformers' registry; use kv_cache=none")

    @property
    def modules(self) -> list[str]:
        """Names of the attention modules that keep a cache, in model order."""
        return [name for module, name in self._names.items() if module in self._quantizers_of]

    def ranges(self) -> KvRanges:
        """What was calibrated."""
        return {self._names[m]: (_range(keys), _range(values)) for m, (keys, values) in self._quantizers_of.items()}

    def load_ranges(self, ranges: KvRanges) -> None:
        """Takes up ranges of the same model and settings instead of calibrating."""
        modules = {name: module for module, name in self._names.items()}
        for name, pair in ranges.items():
            for quantizer, amax in zip(self._quantizers(modules[name]), pair, strict=True):
                if amax is not None:
                    quantizer.amax = amax.to(next(modules[name].parameters()).device)

    def fix_dtypes(self) -> None:
        """Has the quantizers compute in the dtype of the model's weights, whatever it computes in from now on."""
        for module, made in self._quantizers_of.items():
            for quantizer in made:
                quantizers.fix_dtype(quantizer, own_dtype(module) or next(module.parameters()).dtype)

    @contextmanager
    def active(self, name: str | None = None) -> Iterator[None]:
        """Quantizes keys and values until the end of a ``with`` block; calibrate before.

        Args:
            name: Of the only attention module to do so in; all of them by default.
        """

        def quantize(module: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
            if name not in (None, self._names[module]):
                return keys, values
            of_keys, of_values = self._quantizers_of[module]
            return of_keys(keys), of_values(values)

        with attention(self._wrapped(quantize)):
            yield

    def _wrapped(self, change: Callable[[nn.Module, torch.Tensor, torch.Tensor], KeysAndValues]) -> Wrap:
        def wrap(own: Attention) -> Attention:
            def function(
                module: nn.Module,
                queries: torch.Tensor,
                keys: torch.Tensor,
                values: torch.Tensor,
                *args: object,
                **kwargs: object,
            ) -> tuple[torch.Tensor, ...]:
                if module in self._names:
                    keys, values = change(module, keys, values)
                return own(module, queries, keys, values, *args, **kwargs)

            return function

        return wrap

    def _quantizers(self, module: nn.Module) -> tuple[TensorQuantizer, TensorQuantizer]:
        if module not in self._quantizers_of:
            device = next(module.parameters()).device
            made = [quantizers.make_quantizer(self._attributes, device) for _ in range(2)]
            self._quantizers_of[module] = (made[0], made[1])
        return self._quantizers_of[module]


class KvTaps:
    """Scores of keys and values in every format, at the output of each attention module.

    In the backward pass of a batch, when the gradient ``g`` of an attention's output ``y`` arrives,
    ``Σ (g · (y_c − y))²`` is added for each format ``c``, where ``y_c`` has quantized keys and values: ModelOpt's raw
    score, of a module that its search does not know.

    Args:
        model: The whole model, unquantized.
        formats: Names of :data:`~layerbits.candidates.kv_cache.KV_FORMATS`.
        language_model: Name of the language model's module.
    """

    def __init__(self, model: PreTrainedModel, formats: Sequence[str], language_model: str = "") -> None:
        self._caches = [KvCache(model, KV_FORMATS[name], language_model) for name in formats]
        self._scores: dict[nn.Module, list[float]] = {}

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Finds the ranges of all formats.

        Raises:
            UserError: As :meth:`KvCache.calibrate`.
        """
        for cache in self._caches:
            cache.calibrate(batches)

    @property
    def modules(self) -> list[str]:
        """Names of the attention modules, in model order (``A``)."""
        return self._caches[0].modules

    @contextmanager
    def observed(self, recomputed: bool) -> Iterator[None]:
        """Scores what runs backward until the end of a ``with`` block.

        Args:
            recomputed: Whether gradient checkpointing may be on.
        """
        self._scores = {module: [0.0] * len(self._caches) for module in self._caches[0]._quantizers_of}

        def wrap(own: Attention) -> Attention:
            def function(
                module: nn.Module,
                queries: torch.Tensor,
                keys: torch.Tensor,
                values: torch.Tensor,
                *args: object,
                **kwargs: object,
            ) -> tuple[torch.Tensor, ...]:
                made = own(module, queries, keys, values, *args, **kwargs)
                output = made[0]
                if module in self._scores and output.requires_grad:
                    saved = Saved((queries, keys, values, output), recomputed)
                    output.register_hook(lambda gradient: self._add(own, module, saved, args, kwargs, gradient))
                return made

            return function

        with attention(wrap):
            yield

    def take(self) -> npt.NDArray[np.float64]:
        """``[A, formats]`` raw scores of what was observed."""
        return np.array([self._scores[module] for module in self._caches[0]._names if module in self._scores])

    def _add(
        self,
        own: Attention,
        module: nn.Module,
        saved: Saved,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        gradient: torch.Tensor,
    ) -> None:
        queries, keys, values, output = saved.take()
        with torch.no_grad():
            for at, cache in enumerate(self._caches):
                of_keys, of_values = cache._quantizers_of[module]
                changed = own(module, queries, of_keys(keys), of_values(values), *args, **kwargs)[0]
                g, c, y = (t.flatten(2) for t in (gradient, changed, output))  # heads and their features are one
                self._scores[module][at] += float(token_scores(g, c, y).double().sum())


def _ranged(quantizer: TensorQuantizer) -> bool:
    return quantizers.needs_range(quantizer) and not quantizer._use_constant_amax


def _range(quantizer: TensorQuantizer) -> torch.Tensor | None:
    return quantizer.amax if _ranged(quantizer) else None


@contextmanager
def attention(wrap: Wrap) -> Iterator[None]:
    """Puts a function around every attention function that transformers' models fetch, for a while."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    def get_interface(name: str, default: Attention) -> Attention:
        function = type(registry).get_interface(registry, name, default)
        for each in _WRAPS:
            function = each(function)
        return function

    _WRAPS.append(wrap)
    registry.get_interface = get_interface
    try:
        yield
    finally:
        _WRAPS.remove(wrap)
        if not _WRAPS:
            del registry.get_interface
