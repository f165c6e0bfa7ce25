"""Quant pairs and formats: from a name or a dict to one checked ModelOpt 0.47 configuration."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import cast, overload

from layerbits.candidates.linear import (
    E4M3,
    FP4,
    INPUT,
    WEIGHT,
    Cfg,
    Config,
    LinearConfig,
    block_lengths,
    check_dimensions,
    is_mx,
    read_config,
)
from layerbits.errors import UserError
from layerbits.plain import JsonMapping, JsonObject

FP4_VARIANTS = ("mxfp4", "nvfp4")
NVFP4_BLOCK = 16

_CONFIG_KEYS = ("quant_cfg", "algorithm", "effective_bits")
_WEIGHT_NUMERICS = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
_MLP = ("*mlp*", "*block_sparse_moe*", "*.experts.*")
_ATTENTION = ("*attn*", "*attention*")


@dataclass(frozen=True)
class _Recipe:
    """One of our formats: numerics by name, where they apply, whether ModelOpt's name-based exclusions hold."""

    weight: str
    activation: str | None = None
    only: tuple[str, ...] = ("*",)
    exclusions: bool = True


_OURS: dict[str, _Recipe] = {
    "MXFP4_WEIGHT_ONLY_CFG": _Recipe("mxfp4"),
    "FP8_WEIGHT_ONLY_CFG": _Recipe("fp8"),
    "INT8_WEIGHT_FP8_ACT_CFG": _Recipe("int8", "fp8"),
    "INT4_WEIGHT_FP8_ACT_CFG": _Recipe("int4", "fp8"),
    **{f"{w.upper()}_WEIGHT_INT8_ACT_CFG": _Recipe(w, "int8") for w in _WEIGHT_NUMERICS if w != "int8"},
    **{f"{w.upper()}_WEIGHT_INT4_ACT_CFG": _Recipe(w, "int4") for w in _WEIGHT_NUMERICS},
    "FP8_ALL_LAYERS_CFG": _Recipe("fp8", "fp8", exclusions=False),
    "INT8_ALL_LAYERS_CFG": _Recipe("int8", "int8", exclusions=False),
    "FP8_MLP_ONLY_CFG": _Recipe("fp8", "fp8", _MLP),
    "FP8_ATTENTION_ONLY_CFG": _Recipe("fp8", "fp8", _ATTENTION),
    "INT8_MLP_ONLY_CFG": _Recipe("int8", "int8", _MLP),
    "INT8_ATTENTION_ONLY_CFG": _Recipe("int8", "int8", _ATTENTION),
}


_WEIGHTS_OF = {
    "NVFP4_MSE_WEIGHT_ONLY_CFG": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "NVFP4_FOUR_OVER_SIX_WEIGHT_ONLY_CFG": "NVFP4_FOUR_OVER_SIX_CFG",
}
"""Formats of ours that are the weights of a ModelOpt preset."""


@dataclass(frozen=True)
class QuantPair:
    """Weight precision x activation precision and the format that realizes it.

    Attributes:
        weight: ``fp4``, ``fp8``, ``int8``, ``int4``, …; checked against the format.
        activation: The same, or ``fp16`` = input quantizers disabled (activations stay in the compute dtype).
        format: What :func:`resolve_format` accepts.
        experimental: Needs ``experimental=true``.
        note: What a user should know before choosing it.
    """

    name: str
    weight: str
    activation: str
    format: str | JsonMapping
    experimental: bool = False
    note: str = ""

    @classmethod
    def from_mapping(cls, mapping: JsonMapping) -> QuantPair:
        """Reads the YAML of a quant pair.

        Raises:
            UserError: A key is unknown or missing, or the name cannot be used in run names.
        """
        known = {f.name for f in fields(cls)}
        unknown, missing = (
            sorted(set(mapping) - known),
            sorted({"name", "weight", "activation", "format"} - set(mapping)),
        )
        if unknown or missing:
            wrong = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise UserError(
                f"quant pair {mapping.get('name', '?')}: {wrong}; it has the keys {', '.join(sorted(known))}"
            )
        if not re.fullmatch(r"[\w.-]+", str(mapping["name"])):
            raise UserError(f"quant pair name {mapping['name']!r} must be letters, digits, '_', '-' and '.' only")
        values = {**mapping, "name": str(mapping["name"]), "experimental": bool(mapping.get("experimental", False))}
        return cls(**values)


@dataclass(frozen=True)
class Format:
    """A ModelOpt configuration that passed every check that needs no model.

    Attributes:
        config: ``quant_cfg`` (ordered list) and ``algorithm``, plain data, not shared with any preset.
        adjustments: What differs from the named preset and why, a line each.
    """

    name: str
    config: Config
    adjustments: tuple[str, ...] = ()

    @cached_property
    def linear(self) -> LinearConfig:
        """What a linear gets of the configuration, which is read once."""
        return read_config(self.config)

    def bare(self) -> Config:
        """The configuration as any covered linear sees it, without module names.

        ``mtq.auto_quantize`` matches entries against ``weight_quantizer`` and ``input_quantizer`` of one module at a
        time, so that ``*mlp*weight_quantizer`` or ``*lm_head*`` would silently match nothing there.
        """
        entries: list[JsonObject] = [{"quantizer_name": "*", "enable": False}]
        for quantizer, cfg in self.linear.cfgs.items():
            if cfg is not None:
                entries.append({"quantizer_name": f"*{quantizer}", "cfg": cfg})
        return {"quant_cfg": entries, "algorithm": self.config["algorithm"]}


def resolve_format(spec: str | JsonMapping, fp4: str = "mxfp4") -> Format:
    """Finds and checks a format.

    Args:
        spec: A ModelOpt preset (``FP8_DEFAULT_CFG``), one of ours (``FP8_WEIGHT_ONLY_CFG``), ``module:ATTRIBUTE``, a
            configuration dict with ``quant_cfg``, or ``{mxfp4: NAME, nvfp4: NAME}``.
        fp4: Which entry of the last form to take.

    Raises:
        UserError: No such format, or ModelOpt refuses it, or its linears would not all get the same setting.
    """
    if isinstance(spec, Mapping):
        if "quant_cfg" in spec:
            return _checked("custom", spec)
        if not spec or set(spec) - set(FP4_VARIANTS):
            raise UserError(
                f"a format dict needs quant_cfg, or a name for each of {', '.join(FP4_VARIANTS)}; got {spec}"
            )
        if fp4 not in spec:
            raise UserError(f"fp4={fp4} has no format in this pair; use fp4={' or '.join(spec)}")
        return resolve_format(spec[fp4])
    if ":" in spec:
        return _checked(spec, _import(spec))
    import modelopt.torch.quantization as mtq

    if spec in _OURS:
        return _checked(spec, _build(_OURS[spec]))
    if spec in _WEIGHTS_OF:
        preset = getattr(mtq, _WEIGHTS_OF[spec])
        entries = [e for e in preset["quant_cfg"] if not e["quantizer_name"].endswith(INPUT)]
        return _checked(spec, {**preset, "quant_cfg": entries})
    if spec in mtq.config.choices:
        return _preset(spec, getattr(mtq, spec))
    names = sorted({*_OURS, *_WEIGHTS_OF, *mtq.config.choices})
    close = difflib.get_close_matches(spec.upper(), names, 4, 0.5) or names
    raise UserError(
        f"format {spec!r} is not known; near it: {', '.join(close)}; for one of your own give module:ATTRIBUTE "
        "or a dict with quant_cfg"
    )


def normalise(config: JsonMapping) -> Config:
    """Any spelling that ModelOpt 0.47 accepts as its ordered list of entries, freshly copied.

    Accepts what JSON and YAML make of a configuration as well: string keys in ``block_sizes``, lists for tuples and
    ``e4m3`` for ``(4, 3)`` (the spelling of ModelOpt's own recipes).

    Raises:
        UserError: ModelOpt refuses it.
    """
    from modelopt.torch.quantization.config import QuantizeConfig

    if unknown := sorted(set(config) - set(_CONFIG_KEYS)):
        raise UserError(f"quantization config has unknown keys {', '.join(unknown)}; it has {', '.join(_CONFIG_KEYS)}")
    try:
        typed = {key: _typed(value, key) for key, value in config.items()}
        dumped = QuantizeConfig(**typed).model_dump(exclude_unset=True)
        algorithm_settings(dumped.get("algorithm", "max"))
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        raise UserError(f"ModelOpt refuses the quantization config ({_reason(error)}); correct that field") from None
    entries = []
    for entry in dumped["quant_cfg"]:
        cfgs = entry.get("cfg") or []
        for cfg in cfgs if isinstance(cfgs, list) else [cfgs]:
            if "enable" in cfg:
                raise UserError(f"{entry['quantizer_name']}: write enable beside cfg; ModelOpt ignores it inside")
        entries.append({k: v for k, v in entry.items() if v is not None})
    return {"quant_cfg": entries, "algorithm": dumped.get("algorithm", "max")}


def algorithm_settings(algorithm: object) -> list[tuple[str, JsonObject]]:
    """Calibration steps as (mode name, settings that differ from ModelOpt's defaults).

    Raises:
        ValueError, AssertionError, KeyError: No such algorithm or setting.
    """
    from modelopt.torch.quantization.mode import CalibrateModeRegistry, get_modelike_from_algo_cfg

    return [
        (name, CalibrateModeRegistry[name].config_class(**settings).model_dump(exclude_defaults=True))
        for name, settings in get_modelike_from_algo_cfg(algorithm)
    ]


@overload
def plain(value: Mapping[str, object]) -> JsonObject: ...


@overload
def plain(value: object) -> object: ...


def plain(value: object) -> object:
    """The value in JSON's types: string keys, lists for tuples.

    Raises:
        UserError: It holds an object that JSON cannot express.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f"quantization config holds {value!r}, which is not plain data; use numbers, strings and lists")


def with_algorithm(format: Format) -> Format:
    """Sets ``algorithm`` to ``max`` where there is none and a static quantizer would never be calibrated."""
    if format.config["algorithm"] is not None:
        return format
    static = [q for q, cfg in format.linear.stages() if cfg.get("type", "static") == "static" and not is_mx(cfg)]
    if not static:
        return format
    why = (
        f"algorithm none → max: the static {' and '.join(static)} would never be calibrated, its range new at each call"
    )
    return replace(format, config={**format.config, "algorithm": "max"}, adjustments=(*format.adjustments, why))


def _checked(name: str, config: JsonMapping, adjustments: tuple[str, ...] = ()) -> Format:
    try:
        format = Format(name, normalise(config))
        for quantizer, cfg in format.linear.stages():
            if (axis := cfg.get("axis")) is not None:
                check_dimensions(quantizer, axis, "axis")
            check_dimensions(quantizer, block_lengths(cfg), "block_sizes dimension")
    except UserError as error:
        raise UserError(f"format {name}: {error}") from None
    read = {e.index for e in format.linear.entries if e.scopes}
    left_out = [
        e["quantizer_name"] for i, e in enumerate(format.config["quant_cfg"]) if e.get("enable", True) and i not in read
    ]
    if left_out:
        adjustments += (f"{', '.join(left_out)} left out: AutoQuantize scores weights and inputs of linears only",)
    if config.get("effective_bits") is not None:
        adjustments += ("effective_bits left out: weight storage bits are counted from the weight quantizer",)
    return with_algorithm(replace(format, adjustments=adjustments))


def _preset(name: str, config: JsonMapping) -> Format:
    normal = normalise(config)
    adjustments: tuple[str, ...] = ()
    for entry in normal["quant_cfg"]:
        cfg = entry.get("cfg")
        for stage in cfg if isinstance(cfg, list) else [cfg or {}]:
            blocks = stage.get("block_sizes") or {}
            if stage.get("num_bits") == FP4 and blocks.get("scale_bits") == E4M3 and blocks[-1] != NVFP4_BLOCK:
                adjustments = (
                    f"NVFP4 block {blocks[-1]} → {NVFP4_BLOCK}: ModelOpt's kernel computes blocks of {NVFP4_BLOCK} "
                    "whatever the preset says, and so does every NVFP4 runtime",
                )
                blocks[-1] = NVFP4_BLOCK
    return _checked(name, normal, adjustments)


def _build(recipe: _Recipe) -> Config:
    """A format of ours from ModelOpt's own numerics and exclusions."""
    import modelopt.torch.quantization as mtq

    def numerics(preset: str, quantizer: str) -> Cfg:
        entry = mtq.config.find_quant_cfg_entry_by_path(getattr(mtq, preset)["quant_cfg"], quantizer)
        return cast("Cfg", dict(entry["cfg"]))

    cfgs = {WEIGHT: numerics(_WEIGHT_NUMERICS[recipe.weight], "*weight_quantizer")}
    if recipe.activation is not None:
        source = "FP8_DEFAULT_CFG" if recipe.activation == "fp8" else "INT8_DEFAULT_CFG"
        cfgs[INPUT] = numerics(source, "*input_quantizer")
        if recipe.activation == "int4":  # ModelOpt has no INT4 activations of its own
            cfgs[INPUT]["num_bits"] = 4
    default = mtq.FP8_DEFAULT_CFG["quant_cfg"]
    set_by_us = ("*", "*weight_quantizer", "*input_quantizer")
    excluded = [
        e for e in default if e.get("parent_class") or (recipe.exclusions and e["quantizer_name"] not in set_by_us)
    ]
    own = [
        {"quantizer_name": f"{where}{quantizer}", "cfg": cfg}
        for where in recipe.only
        for quantizer, cfg in cfgs.items()
    ]
    # Microscaling weights alone leave nothing to calibrate.
    algorithm = None if recipe.weight == "mxfp4" and recipe.activation is None else "max"
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *own, *excluded], "algorithm": algorithm}


def _import(spec: str) -> JsonMapping:
    module, _, attribute = spec.partition(":")
    try:
        config = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"format {spec}: cannot import {module} ({error}); put its folder on PYTHONPATH") from None
    except AttributeError:
        raise UserError(f"format {spec}: {module} has no {attribute}; check the name after the colon") from None
    if not isinstance(config, Mapping) or "quant_cfg" not in config:
        raise UserError(f"format {spec} is not a dict with quant_cfg; make it a ModelOpt quantization config")
    return config


def _typed(value: object, key: str = "") -> object:
    """The types that ModelOpt's schema wants, from what JSON or YAML made of them."""
    if isinstance(value, Mapping):
        return {
            int(k) if isinstance(k, str) and re.fullmatch(r"-?\d+", k) else k: _typed(v, str(k))
            for k, v in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_typed(v) for v in value]
        return tuple(items) if key in ("num_bits", "scale_bits", "axis") else items
    if key in ("num_bits", "scale_bits") and (match := re.fullmatch(r"[eE](\d+)[mM](\d+)", str(value))):
        return int(match[1]), int(match[2])
    return value


def _reason(error: Exception) -> str:
    """One line of what pydantic tells in many."""
    details = getattr(error, "errors", None)
    if details is None:
        return str(error) or repr(error)
    first = details()[0]
    where = next((str(part) for part in reversed(first["loc"]) if "[" not in str(part)), "")
    return f"{where}: {first['msg']}"
