"""Granularity overlays: how many values share a scale, laid over any format without touching its dtypes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeGuard, cast

from layerbits.candidates.formats import Format
from layerbits.candidates.fused import SHARED_RANGE
from layerbits.candidates.linear import (
    E4M3,
    FP8,
    INPUT,
    WEIGHT,
    BlockSizes,
    Cfg,
    Config,
    block_lengths,
    check_dimensions,
)
from layerbits.errors import UserError
from layerbits.plain import JsonMapping, JsonObject

if TYPE_CHECKING:
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer

PATTERNS = {f"*{WEIGHT}": WEIGHT, f"*{INPUT}": INPUT}
KNOBS = ("axis", "block_sizes", "type", "shared")
TYPES = ("static", "dynamic")
BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes")
TOKEN_GROUP_BACKEND = "layerbits_token_group"


class Knobs(TypedDict, total=False):
    """What an overlay may set of a quantizer."""

    axis: int | tuple[int, ...] | None
    block_sizes: BlockSizes | None
    type: str
    shared: bool


@dataclass(frozen=True)
class Overlay:
    """A named change of granularity.

    Attributes:
        quant_cfg_overrides: ``*weight_quantizer`` / ``*input_quantizer`` → some of ``axis``, ``block_sizes``, ``type``,
            in ModelOpt's types (integer dimensions, tuples), and ``shared``: whether linears that runtimes fuse have
            one range for their weights, where a format has a range for the whole tensor at all.
    """

    name: str
    quant_cfg_overrides: Mapping[str, Knobs]

    @classmethod
    def from_mapping(cls, mapping: JsonMapping) -> Overlay:
        """Reads the YAML of an overlay.

        Raises:
            UserError: An unknown key, a knob that is not granularity, or a value out of range.
        """
        name = str(mapping.get("name", ""))
        if set(mapping) != {"name", "quant_cfg_overrides"} or not name:
            keys = ", ".join(map(str, mapping))
            raise UserError(
                f"granularity {name or '?'} needs exactly the keys name, quant_cfg_overrides; it has {keys}"
            )
        overrides = {}
        given = mapping["quant_cfg_overrides"] or {}
        if not isinstance(given, Mapping):
            raise UserError(f"granularity {name}: quant_cfg_overrides={given} has no keys; use {', '.join(PATTERNS)}")
        for pattern, knobs in given.items():
            if pattern not in PATTERNS:
                raise UserError(
                    f"granularity {name}: {pattern} is not one of {', '.join(PATTERNS)}; overlays set only these"
                )
            overrides[pattern] = _knobs(f"granularity {name}, {pattern}", PATTERNS[pattern], knobs or {})
        return cls(name, overrides)


def apply_overlay(format: Format, overlay: Overlay) -> Config:
    """The configuration with the overlay's granularity; neither argument is changed.

    The overlay edits the settings that reach the quantizer, be they for every linear or for some modules. ``axis`` and
    ``block_sizes`` exclude each other: setting one to a value removes the other. Block words (``scale_bits``, …) that
    the overlay does not name stay, as long as there are blocks. A disabled quantizer stays disabled.

    Args:
        format: The format.
        overlay: What to lay over it.

    Raises:
        UserError: The format does not set that quantizer apart from the other, sets it in stages, or the overlay would
            change the dtype of its scales.
    """
    result = copy.deepcopy(format.config)
    for pattern, knobs in overlay.quant_cfg_overrides.items():
        quantizer = PATTERNS[pattern]
        if format.linear.cfgs[quantizer] is None or not knobs:
            continue
        other = INPUT if quantizer == WEIGHT else WEIGHT
        for entry in format.linear.entries:
            if entry.cfg is None or quantizer not in entry.scopes:
                continue
            if other in entry.scopes:
                raise UserError(
                    f"granularity {overlay.name}: the format sets weights and inputs in one entry "
                    f"({entry.pattern}); spell out {' and '.join(PATTERNS)}"
                )
            if isinstance(entry.cfg, list):
                raise UserError(
                    f"granularity {overlay.name}: {entry.pattern} has {len(entry.cfg)} stages and an overlay "
                    "edits one; use quant_granularity=default"
                )
            result["quant_cfg"][entry.index]["cfg"] = _edited(entry.cfg, knobs, overlay.name)
    return result


def with_token_groups(config: Config) -> Config:
    """Names our backend where scales per block are computed on the fly and not quantized themselves.

    ModelOpt documents ``block_sizes: {-1: 128, type: dynamic}`` but 0.47 has no kernel for it (``_fake_quantize``
    hands ``scale_bits=None`` to a kernel that asserts a pair), and its static blocks refuse a second input shape.
    """
    result = copy.deepcopy(config)
    for entry in result["quant_cfg"]:
        cfg = entry.get("cfg") or []
        for stage in cfg if isinstance(cfg, list) else [cfg]:
            if is_token_group(stage):
                stage["backend"] = TOKEN_GROUP_BACKEND
    return result


def is_token_group(cfg: Cfg) -> bool:
    """Whether it is integer or FP8 quantization with dynamic, unquantized scales per block of the last dimension."""
    blocks, bits = cfg.get("block_sizes") or {}, cfg.get("num_bits", 8)
    dynamic = blocks.get("type") == "dynamic" and blocks.get("scale_bits") is None
    return dynamic and blocks.get(-1) is not None and (isinstance(bits, int) or bits == FP8)


def register_backend() -> None:
    """Registers :data:`TOKEN_GROUP_BACKEND` with ModelOpt; a second call changes nothing."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    if not tensor_quantizer.is_registered_quant_backend(TOKEN_GROUP_BACKEND):
        tensor_quantizer.register_quant_backend(TOKEN_GROUP_BACKEND, _token_group)


def _token_group(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """ModelOpt's own integer and FP8 rounding, each group of the last dimension by its own largest magnitude.

    Args:
        inputs: Tensor ``[..., n]``; a last group that is short is filled with zeros.
        quantizer: The ``TensorQuantizer``.
    """
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant, scaled_e4m3
    from torch.nn.functional import pad

    size, width = quantizer.block_sizes[-1], inputs.shape[-1]
    groups = pad(inputs, (0, -width % size)).reshape(-1, size)
    amax = groups.detach().abs().amax(-1, keepdim=True)
    if quantizer.num_bits == FP8:
        rounded = scaled_e4m3(groups, amax, None, *FP8, None, quantizer._pass_through_bwd)
    else:
        how = (quantizer.num_bits, quantizer.unsigned, quantizer.narrow_range, None, quantizer._pass_through_bwd)
        rounded = fake_tensor_quant(groups, amax, None, *how)
    return rounded.reshape(*inputs.shape[:-1], -1)[..., :width]


def _edited(cfg: Cfg, knobs: Knobs, name: str) -> Cfg:
    edited = cfg.copy()
    if "type" in knobs:
        edited["type"] = knobs["type"]
    if "block_sizes" in knobs:
        before = edited.pop("block_sizes", None) or {}
        sizes = knobs["block_sizes"]
        if sizes is not None:
            edited.pop("axis", None)
            edited["block_sizes"] = _blocks(before, sizes, name)
    if "axis" in knobs:
        edited.pop("axis", None)
        if knobs["axis"] is not None:
            edited.pop("block_sizes", None)
            edited["axis"] = knobs["axis"]
    if knobs.get("shared") and _has_tensor_range(edited):
        edited["backend_extra_args"] = {**(edited.get("backend_extra_args") or {}), SHARED_RANGE: True}
    if edited != cfg:
        edited.pop("effective_bits", None)  # it was counted for the granularity before
    return edited


def _has_tensor_range(cfg: Cfg) -> bool:
    """Whether a weight has one static range: a scale per tensor, or NVFP4's scale of scales."""
    if cfg.get("axis") is not None or cfg.get("type", "static") != "static":
        return False
    blocks = cfg.get("block_sizes")
    return not blocks or (blocks.get("scale_bits") == E4M3 and blocks.get("type") == "dynamic")


def _blocks(before: BlockSizes, sizes: BlockSizes, name: str) -> BlockSizes:
    if all(v is None for v in block_lengths({"block_sizes": sizes}).values()):
        return dict(sizes)  # whole dimensions: per channel or token, there are no blocks to describe
    kept: BlockSizes = {k: v for k, v in before.items() if isinstance(k, str)}
    for word in ("scale_bits", "scale_block_sizes"):
        if word in sizes and sizes[word] != kept.get(word):
            raise UserError(
                f"granularity {name}: {word} {sizes[word]} would change the dtype of the scales ({kept.get(word)}); "
                "choose another quant pair"
            )
    return {**kept, **sizes}


def _knobs(where: str, quantizer: str, knobs: JsonMapping) -> Knobs:
    """Checks one quantizer's overrides and gives them ModelOpt's types."""
    for key in knobs:
        if key not in KNOBS:
            raise UserError(
                f"{where}: {key} is not granularity ({', '.join(KNOBS)}); to change the dtype choose another quant pair"
            )
    clean: JsonObject = dict(knobs)
    if clean.get("axis") is not None and clean.get("block_sizes") is not None:
        raise UserError(f"{where}: axis and block_sizes exclude each other; set one of them to null")
    if "type" in clean and clean["type"] not in TYPES:
        raise UserError(f"{where}: type {clean['type']!r} is not known; use {' or '.join(TYPES)}")
    if "shared" in clean:
        if not isinstance(clean["shared"], bool):
            raise UserError(f"{where}: shared {clean['shared']!r} is not known; use true or false")
        if clean["shared"] and quantizer != WEIGHT:
            raise UserError(f"{where}: fused linears have one input and so one range of it; share *{WEIGHT} alone")
    if (axis := clean.get("axis")) is not None:
        axes = [axis] if _is_int(axis) else axis
        if isinstance(axes, str) or not isinstance(axes, Sequence) or not axes or not all(map(_is_int, axes)):
            raise UserError(f"{where}: axis {axis!r} must be null, an integer or a list of integers")
        check_dimensions(quantizer, axes, "axis")
        clean["axis"] = axes[0] if len(axes) == 1 else tuple(axes)
    if (sizes := clean.get("block_sizes")) is not None:
        clean["block_sizes"] = _block_sizes(where, quantizer, sizes)
    return cast("Knobs", clean)


def _block_sizes(where: str, quantizer: str, sizes: object) -> BlockSizes:
    if not isinstance(sizes, Mapping):
        raise UserError(f"{where}: block_sizes {sizes!r} must be null or a mapping such as {{-1: 128}}")
    clean: BlockSizes = {}
    for key, value in sizes.items():
        if key in BLOCK_WORDS:
            clean[key] = tuple(value) if isinstance(value, list) else value
            continue
        try:
            dimension = int(key)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: block_sizes key {key!r} is neither a dimension nor one of {', '.join(BLOCK_WORDS)}"
            ) from None
        if value is not None and not (_is_int(value) and value > 0):
            raise UserError(
                f"{where}: block length {value!r} must be a positive integer, or null for the whole dimension"
            )
        clean[dimension] = value
    lengths = block_lengths({"block_sizes": clean})
    if not lengths:
        raise UserError(f"{where}: block_sizes names no dimension; give one such as {{-1: 128}}")
    check_dimensions(quantizer, lengths, "block_sizes dimension")
    if clean.get("type", "static") not in TYPES:
        raise UserError(f"{where}: block_sizes type {clean['type']!r} is not known; use {' or '.join(TYPES)}")
    return clean


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
