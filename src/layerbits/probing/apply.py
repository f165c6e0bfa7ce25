"""A scheme as a running model: fake quantizers in front of the linears of a loaded model, and away again.

The linears get a forward of their own that quantizes input and weight with ModelOpt's ``TensorQuantizer``; the weights
themselves are never written. So several schemes take turns on one loaded model, and without one it computes bit for
bit what it did before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from layerbits.candidates import backends, fp4
from layerbits.candidates.formats import Format, normalise, plain
from layerbits.candidates.fused import fused, shares_range
from layerbits.candidates.granularity import TOKEN_GROUP_BACKEND, register_backend
from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.experts import fused_experts
from layerbits.inputs.linears import is_quantizable, run, weight_of
from layerbits.inputs.models import output_head
from layerbits.inputs.offload import offloaded
from layerbits.inputs.residence import device_of, own_dtype
from layerbits.results.result import CandidateInfo
from layerbits.scoring import quantizers
from layerbits.scoring.experts import ExpertsTap
from layerbits.scoring.kv_cache import KvCache, KvRanges
from layerbits.scoring.taps import Taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch
    from layerbits.schemes import Scheme


@dataclass(frozen=True)
class Ranges:
    """Static activation ranges of an unquantized model, for any number of schemes.

    Attributes:
        amax: Full module name → settings of an input quantizer (JSON), for an expert module after the name of the
            projection, → largest magnitude.
        kv: Format of the KV cache → its ranges.
    """

    amax: Mapping[str, Mapping[str, Any]]
    kv: Mapping[str, KvRanges] = field(default_factory=dict)


def find_ranges(model: PreTrainedModel, schemes: Sequence[Scheme], batches: Sequence[Batch]) -> Ranges:
    """Finds the static activation ranges that some schemes need, of all linears in one forward over the batches.

    Args:
        model: The whole model, unquantized.
        schemes: What will be applied.
        batches: Calibration batches (``Calibration.calib``).

    Raises:
        UserError: A linear of a scheme is not in the model or never called, its input is not finite, or the model
            has no KV cache to quantize.
        Unsupported: A candidate needs more than ranges (AWQ, SmoothQuant, chained quantizers).
    """
    kv: dict[str, KvRanges] = {}
    for scheme in schemes:
        if scheme.kv_cache not in (NO_CACHE, *kv):
            cache = _cache(model, scheme)
            cache.calibrate(batches)
            kv[scheme.kv_cache] = cache.ranges()
    infos = {c.config_hash: c for scheme in schemes for c in scheme.candidates}
    names = list(dict.fromkeys(module for scheme in schemes for module in scheme.modules))
    linears = {name: _linear(model, name) for name in names}
    if not linears:
        return Ranges({}, kv)
    device = model.get_input_embeddings().weight.device
    settings = quantizers.distinct_settings([runtime_config(c, device) for c in infos.values()])
    taps = Taps(model, names, settings)
    taps.calibrate(batches, need_logits=output_head(model) in linears)
    found = taps.ranges()
    return Ranges(
        {
            tap.name: {_key(settings, i, site): found[name] for name, site, i, _ in tap.range_names() if name in found}
            for tap in taps.taps
        },
        kv,
    )


class AppliedScheme:
    """A scheme in force on a model until :meth:`remove`, or until the end of a ``with`` block."""

    def __init__(self, scheme: Scheme, linears: Mapping[str, Any], cache: ExitStack) -> None:
        self.scheme = scheme
        self._linears = linears
        self._cache = cache

    def remove(self) -> None:
        """Takes the quantizers away; a second call does nothing."""
        for module in self._linears.values():
            _restore(module)
        self._linears = {}
        self._cache.close()

    def __enter__(self) -> AppliedScheme:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


Made = MutableMapping[tuple[str, str], Any]
"""Quantized forwards by module name and configuration hash, for the next scheme that needs the same."""


def apply_scheme(
    model: PreTrainedModel,
    scheme: Scheme,
    calibration: Sequence[Batch] | Ranges,
    keep_weights: bool = True,
    made: Made | None = None,
) -> AppliedScheme:
    """Makes a loaded model compute what a scheme says; ``model(**inputs)`` works as before.

    Within :func:`layerbits.scoring.precision.computing` the model may compute in float32: quantizers then still see and
    give the model's own dtype. Find the ranges before.

    Args:
        model: The whole model, as loaded; its weights are not touched.
        scheme: What to apply.
        calibration: Calibration batches, or the ranges that :func:`find_ranges` found with them for several schemes.
        keep_weights: Hold the quantized weights beside the weights; otherwise quantize them in every forward.
        made: Keeps what was made here for the next scheme on this model with the same ranges, and takes what is there.

    Raises:
        UserError: A linear is not in the model, is under another scheme, or has no range.
        Unsupported: A candidate that ModelOpt alone can calibrate.
    """
    linears = {name: _linear(model, name) for name in scheme.modules}
    for name, module in linears.items():
        if _MARK in vars(module):
            raise UserError(f"{name} is under scheme {vars(module)[_MARK]} already; remove that one first")
    ranges = calibration if isinstance(calibration, Ranges) else find_ranges(model, [scheme], calibration)
    keep_weights = keep_weights and offloaded(model) is None  # what stays in host memory does not fit twice
    forwards: Made = {} if made is None else made
    keys = {name: (name, info.config_hash) for name, info in scheme.modules.items()}
    together, wholes = fused_with(linears), _whole_ranges(scheme, linears)
    with torch.no_grad():
        for name, info in scheme.modules.items():
            if keys[name] in forwards:
                continue
            if fused_experts(linears[name]) is not None:
                forwards[keys[name]] = experts_tap(linears[name], name, info, ranges).quantized((0, 0), keep_weights)
            else:
                pair = module_quantizers(linears[name], name, info, ranges, together[name], wholes.get(name))
                forwards[keys[name]] = _quantized_forward(linears[name], *pair, keep_weights)
    stack = ExitStack()
    if scheme.kv_cache != NO_CACHE:
        cache = _cache(model, scheme)
        cache.load_ranges(ranges.kv[scheme.kv_cache])
        cache.fix_dtypes()
    for name, module in linears.items():
        _replace(module, forwards[keys[name]], scheme.name)
    if scheme.kv_cache != NO_CACHE:
        stack.enter_context(cache.active())
    return AppliedScheme(scheme, linears, stack)


def _cache(model: PreTrainedModel, scheme: Scheme) -> KvCache:
    return KvCache(model, KV_FORMATS[scheme.kv_cache], scheme.model.language_model)


def fused_with(linears: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name of a linear → itself and the linears that runtimes fuse with it."""
    return {name: [linears[n] for n in names] for names in fused(linears) for name in names}


def _whole_ranges(scheme: Scheme, linears: Mapping[str, Any]) -> dict[str, Any]:
    """Ranges that ModelOpt has linears share: of NVFP4 with stored block ranges, by module name."""
    found: dict[str, Any] = {}
    for info in scheme.candidates:
        if quantizers.distinct_settings([runtime_config(info, "cpu")]).share_ranges:
            mine = [name for name, other in scheme.modules.items() if other.name == info.name]
            found |= quantizers.shared_largest(
                (n, weight_of(linears[n])) for n in mine if hasattr(linears[n], "weight")
            )
    return found


def module_quantizers(
    module: Any, name: str, info: CandidateInfo, ranges: Ranges, together: Sequence[Any], whole: Any = None
) -> tuple[Any, Any]:
    """ModelOpt's quantizers of a linear's weight and input under a candidate, calibrated; ``None`` = disabled.

    Args:
        module: The linear, with its original weight.
        name: Its full name in the model.
        info: The candidate.
        ranges: Ranges that cover it.
        together: It and the linears that runtimes fuse with it: a candidate may have them share a range.
        whole: What the scale of its block scales is made for, where the blocks' ranges are stored; its own by default.

    Raises:
        UserError: There is no range for it.
    """
    device = device_of(module)
    settings = quantizers.distinct_settings([runtime_config(info, device)])
    weight_quantizer = quantizers.make_quantizer(settings.weights[0], device)
    input_quantizer = quantizers.make_quantizer(settings.inputs[0], device)
    with torch.no_grad():
        quantizers.calibrate_weight(weight_quantizer, _own_weight(module), settings.searches[0], whole)
        if weight_quantizer is not None and shares_range(weight_quantizer):
            others = [quantizers.make_quantizer(settings.weights[0], device_of(m)) for m in together]
            for other, linear in zip(others, together, strict=True):
                quantizers.calibrate_weight(other, _own_weight(linear))
            quantizers.share_ranges([weight_quantizer, *others])
    if quantizers.needs_range(input_quantizer):
        amax = _range_of(ranges, name, info, _key(settings, 0))
        input_quantizer.amax = torch.as_tensor(amax).to(device, own_dtype(module) or module.weight.dtype)
    quantizers.fix_dtype(input_quantizer, own_dtype(module))
    return weight_quantizer, input_quantizer


def experts_tap(module: Any, name: str, info: CandidateInfo, ranges: Ranges) -> ExpertsTap:
    """An expert module under a candidate, calibrated; the candidate's is its only pair of settings.

    Args:
        module: The expert module, with its original weights.
        name: Its full name in the model.
        info: The candidate.
        ranges: Ranges that cover it.

    Raises:
        UserError: There is no range for it.
    """
    experts = fused_experts(module)
    assert experts is not None
    weight = getattr(module, experts.projections[0])
    device = device_of(module)
    settings = quantizers.distinct_settings([runtime_config(info, device)])
    tap = ExpertsTap(name, module, settings, experts)
    if (own := own_dtype(module)) is not None:
        tap.fix_dtype(own)
    with torch.no_grad():
        tap.calibrate_weights()
        for _, site, _, quantizer in tap.range_names():
            amax = torch.as_tensor(_range_of(ranges, name, info, _key(settings, 0, site)))
            quantizer.amax = amax.to(device, own or weight.dtype)
    return tap


def runtime_config(info: CandidateInfo, device: Any) -> dict[str, Any]:
    """A candidate's ModelOpt config with bare quantizer names, as it is computed on a device.

    FP4 uses our backend where ModelOpt's kernels cannot run; token groups always use ours.

    Args:
        info: The candidate.
        device: A torch device.
    """
    config = Format(info.format_name, normalise(info.config)).bare()
    if TOKEN_GROUP_BACKEND in str(plain(config)):
        register_backend()
    if getattr(device, "type", device) == "cuda" and fp4.cuda_kernels_available():
        return config
    backends.register_backends()
    return backends.with_reference_backend(config)


_MARK = "_layerbits_scheme"


def _range_of(ranges: Ranges, name: str, info: CandidateInfo, key: str) -> Any:
    amax = ranges.amax.get(name, {}).get(key)
    if amax is None:
        raise UserError(f"no activation range of {name} under {info.name}; find the ranges with this scheme as well")
    return amax


def _linear(model: PreTrainedModel, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the model has no linear {name}; apply the scheme to the model that it was made from"
        ) from None
    if not is_quantizable(module) and fused_experts(module) is None:
        raise Unsupported(f"{name} is a {type(module).__name__}; schemes are applied to linears and expert modules")
    return module


def _key(settings: quantizers.QuantizerSettings, at: int, site: str = "") -> str:
    attributes, headroom = settings.inputs[at], settings.headrooms[at]
    told = "none" if attributes is None else attributes.model_dump_json()
    return f"{site}{told}{json.dumps(headroom) if headroom else ''}"


def _own_weight(module: Any) -> Any:
    """The weight in its own dtype, whatever the model computes in."""
    weight = weight_of(module)
    return weight.to(own_dtype(module) or weight.dtype)


def _quantized_forward(module: Any, weight_quantizer: Any, input_quantizer: Any, keep_weights: bool) -> Any:
    def quantized() -> Any:
        weight = _own_weight(module)
        return weight if weight_quantizer is None else weight_quantizer(weight)

    kept = quantized().detach() if keep_weights else None

    def forward(x: torch.Tensor) -> Any:
        weight = quantized() if kept is None else kept
        return run(module, x if input_quantizer is None else input_quantizer(x), weight.to(x.dtype))

    return forward


def _slot(module: Any) -> str:
    # accelerate, which spreads a model over GPUs, puts its own forward in front and keeps the original here
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _replace(module: Any, forward: Any, name: str) -> None:
    slot = _slot(module)
    vars(module)[_MARK] = name
    vars(module)[f"{_MARK}_before"] = vars(module).get(slot)
    vars(module)[slot] = forward


def _restore(module: Any) -> None:
    slot = _slot(module)
    del vars(module)[_MARK]
    before = vars(module).pop(f"{_MARK}_before")
    if before is None:
        del vars(module)[slot]
    else:
        vars(module)[slot] = before
