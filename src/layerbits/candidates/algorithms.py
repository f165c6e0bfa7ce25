"""Calibration algorithms: which of ModelOpt's need nothing but the weights and ranges of the unquantized model.

Those can be found for all candidates together, before one pass scores them. The others change weights or scales by what
quantized activations do to them, so that ModelOpt's own search calibrates and scores such a candidate alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerbits.plain import JsonObject

_MSE_DEFAULTS = {"step_size": 0.1, "start_multiplier": 0.25, "stop_multiplier": 4.0, "fp8_scale_sweep": False}
_HEADROOM_DEFAULTS = {"anchor_percentile": 1.0, "upper_percentile": 99.99, "rho": 16384.0}
_NO_MATTER = {"method", "distributed_sync", "sync_expert_weight_amax", "skip_forward_without_activation_calib"}


@dataclass(frozen=True)
class Ranges:
    """How an algorithm of one pass finds ranges.

    Attributes:
        weights: Settings of the ``mse`` search, ``None`` = largest magnitudes.
        inputs: Percentiles and factor of ``nvfp4_act_headroom``, ``None`` = largest magnitudes.
    """

    weights: Mapping[str, float] | None = None
    inputs: Mapping[str, float] | None = None


def ranges_of(algorithm: object) -> Ranges | None:
    """How an algorithm finds ranges; ``None`` where one pass cannot.

    Args:
        algorithm: As a ModelOpt configuration spells it: a name, a mapping with ``method``, a list of them, ``None``.
    """
    if isinstance(algorithm, list | tuple):
        return ranges_of(algorithm[0]) if len(algorithm) == 1 else None
    settings: JsonObject = dict(algorithm) if isinstance(algorithm, Mapping) else {"method": algorithm}
    method = settings.get("method")
    if _layerwise(settings.pop("layerwise", None)) or settings.pop("shared_states", None):
        return None
    given = {k: v for k, v in settings.items() if k not in _NO_MATTER and v is not None}
    if method in (None, "max"):
        return None if given else Ranges()
    if method == "mse":
        return Ranges(weights={**_MSE_DEFAULTS, **given}) if given.keys() <= _MSE_DEFAULTS.keys() else None
    if method == "nvfp4_act_headroom":
        inner = ranges_of(given.pop("weight_scale_algorithm", "max"))
        if inner is None or inner.inputs is not None or not given.keys() <= _HEADROOM_DEFAULTS.keys():
            return None
        return Ranges(inner.weights, {**_HEADROOM_DEFAULTS, **given})
    return None


def _layerwise(value: object) -> bool:
    return bool(value.get("enable")) if isinstance(value, Mapping) else bool(value)
