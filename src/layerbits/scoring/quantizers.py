"""ModelOpt's quantizers for many candidates at once: one per distinct setting, calibrated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerbits.errors import Unsupported


@dataclass(frozen=True)
class Settings:
    """Distinct quantizer settings of a set of candidates.

    Attributes:
        weights: Distinct settings of weight quantizers; ``None`` = the weight stays as it is.
        inputs: The same for input quantizers.
        pairs: Per candidate the positions of its (weight, input) settings.
    """

    weights: tuple[Any, ...]
    inputs: tuple[Any, ...]
    pairs: tuple[tuple[int, int], ...]


def distinct_settings(configs: Sequence[Mapping[str, Any]]) -> Settings:
    """Finds what a set of search configs has in common.

    Args:
        configs: ModelOpt configs with bare quantizer names.

    Raises:
        Unsupported: A config needs more than one range per tensor (AWQ, SmoothQuant, chained quantizers).
    """
    from modelopt.torch.quantization.algorithms import _match_quantizer_cfg
    from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig

    weights: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    pairs = []
    for config in configs:
        checked = QuantizeConfig(**config)
        if checked.algorithm not in (None, "max") and checked.algorithm != {"method": "max"}:
            raise Unsupported(
                f"algorithm {checked.algorithm!r} is calibrated by ModelOpt alone; use autoquant.engine=stock"
            )
        pair = []
        for known, name in ((weights, "weight_quantizer"), (inputs, "input_quantizer")):
            attributes, enabled = _match_quantizer_cfg(checked.quant_cfg, name)
            if isinstance(attributes, list):
                raise Unsupported("chained quantizers need ModelOpt's own search; use autoquant.engine=stock")
            if not enabled or attributes is None:
                key, value = "none", None
            else:
                value = QuantizerAttributeConfig.model_validate(attributes)
                key = value.model_dump_json()
            known.setdefault(key, value)
            pair.append(list(known).index(key))
        pairs.append((pair[0], pair[1]))
    return Settings(tuple(weights.values()), tuple(inputs.values()), tuple(pairs))


def make_quantizer(attributes: Any, device: Any) -> Any:
    """A ModelOpt quantizer with these attributes, ``None`` for a disabled one."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return None if attributes is None else TensorQuantizer(attributes).to(device)


def needs_range(quantizer: Any) -> bool:
    """Whether a quantizer works with a range that calibration must find."""
    return quantizer is not None and not quantizer._dynamic and not quantizer.is_mx_format


def calibrate_weight(quantizer: Any, weight: Any) -> None:
    """Finds the range of a weight as ModelOpt's ``max`` calibration does."""
    if not needs_range(quantizer):
        return
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    quantizer.enable_quant()
    quantizer.disable_calib()


def largest(x: Any, axis: Any) -> Any:
    """Largest magnitude of an input along the axes that a quantizer does not keep, as ModelOpt's max calibrator.

    Args:
        x: Input of a linear, ``[..., in_features]``.
        axis: The quantizer's axis: ``None`` = one range, ``-1`` = one per feature.
    """
    from modelopt.torch.quantization.utils import convert_quantization_axis_to_reduce_axis, reduce_amax

    return reduce_amax(x, axis=convert_quantization_axis_to_reduce_axis(x, axis))


def by_token(quantizer: Any) -> bool:
    """Whether an input quantizer treats each row of ``[tokens, features]`` by itself.

    A fixed range does, and so do scales per token or per block of a token; a range per call does not.
    """
    from layerbits.candidates.granularity import TOKEN_GROUP_BACKEND

    if (
        quantizer is None
        or needs_range(quantizer)
        or quantizer.is_mx_format
        or quantizer.backend == TOKEN_GROUP_BACKEND
    ):
        return True
    blocks = quantizer.block_sizes or {}
    lengths = {k % 2: v for k, v in blocks.items() if isinstance(k, int)}
    if lengths:
        return lengths == {1: None}
    axis = quantizer.axis
    return 0 in {a % 2 for a in ([axis] if isinstance(axis, int) else axis or ())}
