"""A scheme as a running model: what :mod:`layerbits.scoring.assigned` needs of a scheme, and the scheme in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.candidates.runtime import runtime_config
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.experts import fused_experts
from layerbits.inputs.linears import is_quantizable
from layerbits.inputs.offload import offloaded
from layerbits.inputs.residence import device_of
from layerbits.plain import JsonObject
from layerbits.scoring import assigned
from layerbits.scoring.assigned import AssignedModel, InputRanges, Made
from layerbits.scoring.kv_cache import KvCache, KvRanges

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch
    from layerbits.schemes import Scheme


@dataclass(frozen=True)
class Ranges:
    """Static activation ranges of an unquantized model, for any number of schemes.

    Attributes:
        inputs: Of linears and expert modules.
        kv: Format of the KV cache → its ranges.
    """

    inputs: InputRanges
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
    return Ranges(assigned.find_ranges(model, [configs_of(model, scheme) for scheme in schemes], batches), kv)


def apply_scheme(
    model: PreTrainedModel,
    scheme: Scheme,
    calibration: Sequence[Batch] | Ranges,
    keep_weights: bool = True,
    made: Made | None = None,
) -> AssignedModel:
    """Makes a loaded model compute what a scheme says; ``model(**inputs)`` works as before.

    Within :func:`layerbits.scoring.precision.computing` the model may compute in float32: quantizers then still see and
    give the model's own dtype. Find the ranges before.

    Args:
        model: The whole model, as loaded; its weights are not touched.
        scheme: What to apply.
        calibration: Calibration batches, or the ranges that :func:`find_ranges` found with them for several schemes.
        keep_weights: Keep the quantized weights beside the weights; otherwise quantize them in every forward.
        made: Keeps what was made here for the next scheme on this model with the same ranges, and takes what is there.

    Raises:
        UserError: A linear is not in the model, is under another scheme, or has no range.
        Unsupported: A candidate that ModelOpt alone can calibrate.
    """
    configs = configs_of(model, scheme)
    assigned.check_free(model, configs)
    ranges = calibration if isinstance(calibration, Ranges) else find_ranges(model, [scheme], calibration)
    keep_weights = keep_weights and offloaded(model) is None  # what stays in host memory does not fit twice
    forwards = assigned.quantized_forwards(model, configs, ranges.inputs, keep_weights, made)
    cache = None
    if scheme.kv_cache != NO_CACHE:
        cache = _cache(model, scheme)
        cache.load_ranges(ranges.kv[scheme.kv_cache])
        cache.fix_dtypes()
    return AssignedModel(model, forwards, scheme.name, cache)


def configs_of(model: PreTrainedModel, scheme: Scheme) -> dict[str, JsonObject]:
    """The ModelOpt config of each quantized linear of a scheme, as the model computes it where the linear is.

    Raises:
        UserError: A linear is not in the model.
        Unsupported: It is neither a linear nor an expert module.
    """
    made: dict[tuple[str, torch.device], JsonObject] = {}
    configs = {}
    for name, info in scheme.modules.items():
        key = (info.config_hash, device_of(_linear(model, name)))
        if key not in made:
            made[key] = runtime_config(info, key[1])
        configs[name] = made[key]
    return configs


def _cache(model: PreTrainedModel, scheme: Scheme) -> KvCache:
    return KvCache(model, KV_FORMATS[scheme.kv_cache], scheme.model.language_model)


def _linear(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the model has no linear {name}; apply the scheme to the model that it was made from"
        ) from None
    if not is_quantizable(module) and fused_experts(module) is None:
        raise Unsupported(f"{name} is a {type(module).__name__}; schemes are applied to linears and expert modules")
    return module
