"""A model with an assignment on it: the place that puts quantizers on a model's linears, and takes them off.

An assignment gives some linears a ModelOpt configuration each, by full name. A linear gets a forward of its own that
quantizes its input and its weight; the weight itself is never written. So several assignments take turns on one
loaded model, and without one it computes bit for bit what it did before.

In three steps: :func:`find_ranges` runs the unquantized model on the calibration rows, :func:`calibrated` makes the
quantizers of each linear, and :class:`AssignedModel` puts them on the model.

One exception: where each row of a batch has another group quantized (``kl_div``, ``refine``, ``validate``),
:mod:`layerbits.scoring.suffix` puts the same quantized forwards on, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.candidates.formats import plain
from layerbits.candidates.fused import fused, shares_range
from layerbits.errors import UserError
from layerbits.inputs.experts import fused_experts
from layerbits.inputs.linears import weight_of
from layerbits.inputs.models import output_head
from layerbits.inputs.residence import own_dtype
from layerbits.plain import JsonMapping
from layerbits.scoring import quantizers
from layerbits.scoring.experts import Change, ExpertsTap
from layerbits.scoring.patches import Forward
from layerbits.scoring.tap import LinearTap, Tap
from layerbits.scoring.taps import Taps, make_tap

if TYPE_CHECKING:
    import numpy as np
    from modelopt.torch.quantization.nn import TensorQuantizer
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch
    from layerbits.scoring.kv_cache import KvCache

Configs = Mapping[str, JsonMapping]
"""Full name of a linear or expert module → its ModelOpt config with bare quantizer names."""
InputRanges = Mapping[str, Mapping[str, "NDArray[np.float32]"]]
"""Full module name → settings of an input quantizer (JSON), for an expert module after the name of the projection, →
largest magnitude."""
Made = MutableMapping[tuple[str, str], Forward]
"""Quantized forwards by module name and configuration (JSON), for the next assignment that needs the same."""

_MARK = "_layerbits_scheme"
_BEFORE = "_layerbits_scheme_before"


def find_ranges(model: PreTrainedModel, assignments: Sequence[Configs], batches: Sequence[Batch]) -> InputRanges:
    """Finds the static input ranges that some assignments need, of all linears in one forward over the batches.

    Args:
        model: The whole model, unquantized.
        assignments: What will be put on it.
        batches: Calibration batches (``Calibration.calib``).

    Raises:
        UserError: A linear is never called, or its input is not finite.
        Unsupported: A config needs more than ranges (AWQ, SmoothQuant, chained quantizers), or a module is neither a
            linear nor an expert module.
    """
    configs = {_key(config): config for configs in assignments for config in configs.values()}
    names = list(dict.fromkeys(name for configs in assignments for name in configs))
    if not names:
        return {}
    settings = quantizers.distinct_settings(list(configs.values()))
    taps = Taps(model, names, settings)
    taps.calibrate(batches, need_logits=output_head(model) in names)
    ranges = taps.ranges()
    return {
        tap.name: {
            _range_key(settings, i, site): ranges[name] for name, site, i, _ in tap.range_names() if name in ranges
        }
        for tap in taps.taps
    }


def calibrated(model: PreTrainedModel, configs: Configs, ranges: InputRanges) -> dict[str, Tap]:
    """Linears with the quantizers that an assignment gives them, calibrated as ModelOpt does it.

    Within :func:`layerbits.scoring.precision.computing` the model may compute in float32: quantizers then still see
    and give the model's own dtype.

    Args:
        model: The whole model, with its original weights.
        configs: The assignment.
        ranges: Input ranges that cover it.

    Returns:
        By module name a tap whose only setting (0, 0) is that of its config.

    Raises:
        UserError: A linear has no range, or its weight is not finite.
        Unsupported: A config that ModelOpt alone can calibrate.
    """
    keys = {name: _key(config) for name, config in configs.items()}
    settings = {key: quantizers.distinct_settings([configs[name]]) for name, key in keys.items()}
    taps = {name: make_tap(name, model.get_submodule(name), settings[key]) for name, key in keys.items()}
    shared: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for key, one in settings.items():
            if one.share_ranges:
                mine = (tap for name, tap in taps.items() if keys[name] == key and isinstance(tap, LinearTap))
                shared |= quantizers.shared_largest((tap.name, weight_of(tap.module)) for tap in mine)
        for name, tap in taps.items():
            if (own := own_dtype(tap.module)) is not None:
                tap.fix_dtype(own)
            tap.calibrate_weights(shared.get(name))
            dtype = own or next(tap.module.parameters()).dtype
            for _, site, _, quantizer in tap.range_names():
                amax = ranges.get(name, {}).get(_range_key(settings[keys[name]], 0, site))
                if amax is None:
                    raise UserError(
                        f"no activation range of {name} under its candidate; find the ranges with this scheme as well"
                    )
                quantizer.amax = torch.as_tensor(amax).to(tap.device, dtype)
        _share_weight_ranges(taps, keys, settings)
    return taps


def quantized_forwards(
    model: PreTrainedModel, configs: Configs, ranges: InputRanges, keep_weights: bool, made: Made | None = None
) -> dict[str, Forward]:
    """The forward of each linear under an assignment, not yet put on the model.

    Args:
        model: The whole model, with its original weights.
        configs: The assignment.
        ranges: Input ranges that cover it.
        keep_weights: Keep the quantized weights beside the weights; otherwise quantize them in every forward.
        made: Keeps what is made here for the next assignment on this model with the same ranges, and gives what is
            there.

    Raises:
        UserError: As :func:`calibrated`.
        Unsupported: Likewise.
    """
    forwards: Made = {} if made is None else made
    keys = {name: (name, _key(config)) for name, config in configs.items()}
    missing = {name: configs[name] for name, key in keys.items() if key not in forwards}
    with torch.no_grad():
        for name, tap in calibrated(model, missing, ranges).items():
            forwards[keys[name]] = tap.quantized((0, 0), keep_weights)
    return {name: forwards[key] for name, key in keys.items()}


class AssignedModel:
    """An assignment in force on a model until :meth:`remove`, or until the end of a ``with`` block.

    Args:
        model: The whole model.
        forwards: From :func:`quantized_forwards`.
        name: What the assignment is called.
        cache: A calibrated KV cache that is in force meanwhile.

    Raises:
        UserError: A linear is under another assignment.
    """

    def __init__(
        self, model: PreTrainedModel, forwards: Mapping[str, Forward], name: str, cache: KvCache | None = None
    ) -> None:
        check_free(model, forwards)
        self._modules = [model.get_submodule(linear) for linear in forwards]
        self._stack = ExitStack()
        for module, forward in zip(self._modules, forwards.values(), strict=True):
            _put(module, forward, name)
        if cache is not None:
            self._stack.enter_context(cache.active())

    def remove(self) -> None:
        """Takes the quantizers off; a second call does nothing."""
        for module in self._modules:
            _take_off(module)
        self._modules = []
        self._stack.close()

    def __enter__(self) -> AssignedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


@contextmanager
def fixed_quantization(
    model: PreTrainedModel, configs: Configs, batches: Sequence[Batch], cache: KvCache | None = None
) -> Iterator[None]:
    """Quantizes linears, and keys and values, while others are scored: what a recipe has decided already.

    ModelOpt calibrates each format with every other group unquantized, and scores with the decided ones quantized; so
    do we. The weights are quantized in every forward.

    Args:
        model: The whole model, unquantized.
        configs: The assignment.
        batches: What the ranges are found on.
        cache: Of the model, not calibrated yet.
    """
    if cache is not None:
        cache.calibrate(batches)
    ranges = find_ranges(model, [configs], batches)
    with AssignedModel(model, quantized_forwards(model, configs, ranges, keep_weights=False), "the recipe", cache):
        yield


def change_inputs(model: PreTrainedModel, name: str, changes: Mapping[str, Change]) -> None:
    """Changes what enters a linear or an expert module, for good: of a model that has the quantized weights as its own.

    Args:
        model: The whole model.
        name: Full name of the module.
        changes: Input → what is done to it; of a linear ``""``, of an expert module the name of a projection.
    """
    module = model.get_submodule(name)
    experts = fused_experts(module)
    if experts is not None:
        tap = ExpertsTap(name, module, quantizers.UNQUANTIZED, experts)
        vars(module)["forward"] = tap.with_inputs(changes)
    elif (change := changes.get("")) is not None:
        module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))


def check_free(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Checks that no linear has quantizers already.

    Raises:
        UserError: One has.
    """
    for name in names:
        if (other := vars(model.get_submodule(name)).get(_MARK)) is not None:
            raise UserError(f"{name} is under scheme {other} already; remove that one first")


def _key(config: JsonMapping) -> str:
    return json.dumps(plain(config), sort_keys=True)


def _range_key(settings: quantizers.QuantizerSettings, at: int, site: str) -> str:
    attributes, headroom = settings.inputs[at], settings.headrooms[at]
    quantizer = "none" if attributes is None else attributes.model_dump_json()
    return f"{site}{quantizer}{json.dumps(headroom) if headroom else ''}"


def _share_weight_ranges(
    taps: Mapping[str, Tap], keys: Mapping[str, str], settings: Mapping[str, quantizers.QuantizerSettings]
) -> None:
    """Gives fused linears the largest of their ranges under each config that says so."""
    for family in fused(taps):
        for key in dict.fromkeys(keys[name] for name in family):
            attributes = settings[key].weights[0]
            if attributes is None or not shares_range(attributes):
                continue
            linears = [tap for tap in map(taps.__getitem__, family) if isinstance(tap, LinearTap)]
            quantizers.share_ranges(
                [
                    tap.weight_quantizers()[0]
                    if keys[tap.name] == key
                    else _weight_quantizer(tap, settings[key])  # a fused linear with another config counts as well
                    for tap in linears
                ]
            )


def _weight_quantizer(tap: LinearTap, settings: quantizers.QuantizerSettings) -> TensorQuantizer | None:
    other = LinearTap(tap.name, tap.module, settings)
    other.calibrate_weights()
    return other.weight_quantizers()[0]


def _slot(module: nn.Module) -> str:
    # accelerate, which spreads a model over GPUs, puts its own forward in front and keeps the original here
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _put(module: nn.Module, forward: Forward, name: str) -> None:
    slot = _slot(module)
    vars(module)[_MARK] = name
    vars(module)[_BEFORE] = vars(module).get(slot)
    vars(module)[slot] = forward


def _take_off(module: nn.Module) -> None:
    slot = _slot(module)
    del vars(module)[_MARK]
    before = vars(module).pop(_BEFORE)
    if before is None:
        del vars(module)[slot]
    else:
        vars(module)[slot] = before
