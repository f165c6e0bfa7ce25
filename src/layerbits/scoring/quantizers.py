"""ModelOpt's quantizers for many candidates at once: one per distinct setting, calibrated together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, overload

import torch

from layerbits.candidates import nvfp4_static
from layerbits.candidates.algorithms import ranges_of
from layerbits.candidates.fused import shares_range
from layerbits.candidates.linear import E4M3, E8M0, FP4
from layerbits.errors import Unsupported
from layerbits.scoring.fake_quant import quantizer_class

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from torch import nn

Options = Mapping[str, float]
"""How ModelOpt finds a range other than the largest magnitude: the settings of ``mse`` or ``nvfp4_act_headroom``."""


@dataclass(frozen=True)
class QuantizerSettings:
    """Distinct quantizer settings of a set of candidates.

    Attributes:
        weights: Distinct settings of weight quantizers; ``None`` = the weight stays as it is.
        inputs: The same for input quantizers.
        searches: Per weight setting how its ranges are searched (``mse``), ``None`` = largest magnitudes.
        headrooms: Per input setting its percentiles and factor (``nvfp4_act_headroom``), ``None`` likewise.
        pairs: Per candidate the positions of its (weight, input) settings.
    """

    weights: tuple[QuantizerAttributeConfig | None, ...]
    inputs: tuple[QuantizerAttributeConfig | None, ...]
    pairs: tuple[tuple[int, int], ...]
    searches: tuple[Options | None, ...] = ()
    headrooms: tuple[Options | None, ...] = ()

    @property
    def share_ranges(self) -> bool:
        """Whether fused linears share a range: the scale of scales of NVFP4 with stored block ranges."""
        return any(is_static_nvfp4(s) for s in self.weights)

    @property
    def need_calibration(self) -> bool:
        """Whether an input has a range that forwards must find; without one, calibration runs none."""
        return any(needs_range(make_quantizer(s, "cpu")) for s in self.inputs)


UNQUANTIZED = QuantizerSettings((None,), (None,), ((0, 0),))
"""Of one candidate that leaves weights and inputs as they are."""


def distinct_settings(configs: Sequence[Mapping[str, object]]) -> QuantizerSettings:
    """Finds what a set of search configs has in common.

    Args:
        configs: ModelOpt configs with bare quantizer names.

    Raises:
        Unsupported: A config needs more than one range per tensor (AWQ, SmoothQuant, chained quantizers).
    """
    from modelopt.torch.quantization.algorithms import _match_quantizer_cfg
    from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig

    weights: dict[str, QuantizerAttributeConfig | None] = {}
    inputs: dict[str, QuantizerAttributeConfig | None] = {}
    searches: dict[str, Options | None] = {}
    headrooms: dict[str, Options | None] = {}
    pairs = []
    for config in configs:
        checked = QuantizeConfig(**config)
        ranges = ranges_of(checked.algorithm)
        if ranges is None:
            raise Unsupported(
                f"algorithm {checked.algorithm!r} is calibrated by ModelOpt alone; use autoquant.engine=stock"
            )
        pair = []
        for known, hows, how, name in (
            (weights, searches, ranges.weights, "weight_quantizer"),
            (inputs, headrooms, ranges.inputs, "input_quantizer"),
        ):
            attributes, enabled = _match_quantizer_cfg(checked.quant_cfg, name)
            if isinstance(attributes, list):
                raise Unsupported("chained quantizers need ModelOpt's own search; use autoquant.engine=stock")
            if not enabled or attributes is None:
                key, value, how = "none", None, None
            else:
                value = QuantizerAttributeConfig.model_validate(attributes)
                how = dict(how) if how is not None and _affects(how, name, value) else None
                key = value.model_dump_json() + (json.dumps(how) if how else "")
            known.setdefault(key, value)
            hows.setdefault(key, how)
            pair.append(list(known).index(key))
        pairs.append((pair[0], pair[1]))
    return QuantizerSettings(
        tuple(weights.values()),
        tuple(inputs.values()),
        tuple(pairs),
        tuple(searches.values()),
        tuple(headrooms.values()),
    )


def is_static_nvfp4(attributes: QuantizerAttributeConfig | None) -> bool:
    """Whether quantizer attributes are NVFP4 with stored block ranges."""
    blocks = getattr(attributes, "block_sizes", None) or {}
    return (
        attributes is not None
        and tuple(attributes.num_bits if isinstance(attributes.num_bits, tuple | list) else ()) == FP4
        and tuple(blocks.get("scale_bits") or ()) == E4M3
        and blocks.get("type", "static") != "dynamic"
    )


def is_dynamic_nvfp4(attributes: QuantizerAttributeConfig | None) -> bool:
    """Whether quantizer attributes are NVFP4 whose block ranges are found on the fly."""
    blocks = getattr(attributes, "block_sizes", None) or {}
    return (
        attributes is not None
        and attributes.num_bits == FP4
        and blocks.get("scale_bits") == E4M3
        and blocks.get("type") == "dynamic"
    )


def _affects(how: Options, name: str, attributes: QuantizerAttributeConfig) -> bool:
    """Whether a search or a headroom changes the range of such a quantizer, as ModelOpt applies them."""
    blocks = attributes.block_sizes or {}
    if name == "input_quantizer":
        return is_dynamic_nvfp4(attributes) and attributes.constant_amax is None
    if attributes.type == "dynamic" or (blocks.get("type") == "dynamic" and blocks.get("scale_bits") == E8M0):
        return False
    return is_static_nvfp4(attributes) if how["fp8_scale_sweep"] else True


@overload
def make_quantizer(attributes: None, device: torch.device | str) -> None: ...


@overload
def make_quantizer(attributes: QuantizerAttributeConfig, device: torch.device | str) -> TensorQuantizer: ...


def make_quantizer(attributes: QuantizerAttributeConfig | None, device: torch.device | str) -> TensorQuantizer | None:
    """A ModelOpt quantizer with these attributes, ``None`` for a disabled one."""
    return None if attributes is None else quantizer_class()(attributes).to(device)


def fix_dtype(quantizer: TensorQuantizer | None, dtype: torch.dtype | None) -> None:
    """Makes a quantizer compute in a dtype whatever it is given, and give back what it got.

    So a model that is measured in float32 is quantized as it is in its own dtype.

    Args:
        quantizer: A ModelOpt quantizer, ``None`` = disabled.
        dtype: The dtype, ``None`` = that of what comes in.
    """
    if quantizer is None or dtype is None:
        return
    given: list[torch.dtype] = []

    def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        given[:] = [args[0].dtype]
        return (args[0].to(dtype), *args[1:])

    def after(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(given[0])

    # hooks, because ModelOpt changes the class of a quantizer with stored block ranges
    quantizer.register_forward_pre_hook(before)
    quantizer.register_forward_hook(after)


def needs_range(quantizer: TensorQuantizer | None) -> TypeGuard[TensorQuantizer]:
    """Whether a quantizer works with a range that calibration must find."""
    return quantizer is not None and not quantizer._dynamic and not quantizer.is_mx_format


def calibrate_weight(
    quantizer: TensorQuantizer | None,
    weight: torch.Tensor,
    search: Options | None = None,
    shared: torch.Tensor | None = None,
) -> None:
    """Finds the ranges of a weight as ModelOpt's ``max`` or ``mse`` calibration does.

    Args:
        quantizer: Its quantizer, ``None`` = disabled.
        weight: The weight.
        search: Settings of ``mse``, ``None`` for ``max``.
        shared: Largest magnitude of the weights that it is fused with; its own by default.
    """
    from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer

    if not needs_range(quantizer):
        return
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    quantizer.enable_quant()
    quantizer.disable_calib()
    if quantizer.is_nvfp4_static:
        nvfp4_static.install()
        largest_of_all = quantizer.amax.amax() if shared is None else shared
        StaticBlockScaleQuantizer.from_tensor_quantizer(quantizer, global_amax=largest_of_all.float())
    if search is not None:
        _search_ranges(quantizer, weight, search)


def _search_ranges(quantizer: TensorQuantizer, weight: torch.Tensor, search: Options) -> None:
    """Replaces the largest magnitudes by the ranges of least squared error."""
    from modelopt.torch.quantization import model_calib

    if search["fp8_scale_sweep"] and not weight.is_cuda:
        blocks = quantizer._process_for_blockquant(weight.detach())
        quantizer.amax = nvfp4_static.sweep(blocks, quantizer.global_amax).reshape(quantizer.amax.shape)
        return
    names = ("step_size", "start_multiplier", "stop_multiplier", "fp8_scale_sweep")
    calibrator = model_calib._make_weight_mse_calibrator(quantizer, *(search[name] for name in names))
    if calibrator is not None:
        quantizer._calibrator = calibrator
        model_calib._run_and_load_max_stats(quantizer, lambda q: q(weight))


def shared_largest(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Largest magnitude over each weight and those that ModelOpt has it share a range with, by its own patterns.

    Args:
        weights: Full module name and weight, of the modules that get the format; each is looked at once, for it may be
            on the device only then.
    """
    from modelopt.torch.quantization.utils.shared_input import SHARED_PATTERNS

    def group(name: str) -> tuple[str, str]:
        matches = ((pattern, re.fullmatch(pattern, name)) for pattern in SHARED_PATTERNS)
        return next(((pattern, match.group(1) or "") for pattern, match in matches if match), ("", name))

    largest_of: dict[tuple[str, str], torch.Tensor] = {}
    devices: dict[str, torch.device] = {}
    for name, weight in weights:
        devices[name] = weight.device
        amax = weight.detach().abs().amax().float()
        key = group(name)
        largest_of[key] = torch.maximum(largest_of[key], amax.to(largest_of[key])) if key in largest_of else amax
    return {name: largest_of[group(name)].to(device) for name, device in devices.items()}


def share_ranges(quantizers: Sequence[TensorQuantizer | None]) -> None:
    """Gives the quantizers of fused weights the largest of their ranges, where their setting says so.

    Args:
        quantizers: Of one setting, one per weight, each with its range.
    """
    enabled = [quantizer for quantizer in quantizers if quantizer is not None]
    if not enabled or not shares_range(enabled[0]):
        return
    shared = torch.stack([quantizer.amax.float().cpu() for quantizer in enabled]).amax(0)
    for quantizer in enabled:
        quantizer.amax = shared.to(quantizer.amax)


def largest(x: torch.Tensor, axis: int | tuple[int, ...] | None) -> torch.Tensor:
    """Largest magnitude of an input along the axes that a quantizer does not keep, as ModelOpt's max calibrator.

    Args:
        x: Input of a linear, ``[..., in_features]``.
        axis: The quantizer's axis: ``None`` = one range, ``-1`` = one per feature.
    """
    from modelopt.torch.quantization.utils import convert_quantization_axis_to_reduce_axis, reduce_amax

    return reduce_amax(x, axis=convert_quantization_axis_to_reduce_axis(x, axis))


def by_token(quantizer: TensorQuantizer | None) -> bool:
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
