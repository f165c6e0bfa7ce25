"""Candidates of formats that others wrote: under our names where we have the same, under made ones elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from layerbits.candidates.bits import modelopt_bits, precision, weight_bits
from layerbits.candidates.candidate import Candidate, config_hash, resolve_candidate
from layerbits.candidates.formats import FP4_VARIANTS, Format, QuantPair, algorithm_settings, plain, resolve_format
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.linear import INPUT, WEIGHT, Config
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.errors import UserError
from layerbits.plain import JsonObject
from layerbits.results.result import CandidateInfo

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizeConfig


def candidates_of(configs: Sequence[Config], origin: str) -> tuple[Candidate, ...]:
    """A candidate for each configuration, with names that differ.

    Args:
        configs: ModelOpt configurations that set every linear alike.
        origin: What they come from, for the name of a format that is none of ours.

    Raises:
        UserError: One quantizes no weights, or is none that a linear could get.
    """
    made: list[Candidate] = []
    for number, config in enumerate(configs):
        base = resolve_format({k: v for k, v in config.items() if k != "effective_bits"})
        candidate = _known(base) or _new(base, f"{origin}#{number}")
        same = [c for c in made if c.info.name == candidate.info.name]
        made.append(_renamed(candidate, len(same)) if same else candidate)
    return tuple(made)


def settings_key(config: Config) -> str:
    """What tells the numerics of two configurations apart: settings of weight and input, and the calibration."""
    format = resolve_format({k: v for k, v in config.items() if k != "effective_bits"})
    return _key(format)


def _known(format: Format) -> Candidate | None:
    """The shipped pair under the shipped overlay that comes to the same settings and calibration."""
    words = tuple(precision(format.linear.cfgs[q]) for q in (WEIGHT, INPUT))
    key = _key(format)
    for pair, overlay, variant in _shipped(*words):
        try:
            candidate = resolve_candidate(pair, overlay, variant, experimental=True)
        except UserError:
            continue
        if _key(candidate.format) == key:
            return candidate
    return None


def _shipped(weight: str, activation: str) -> Iterator[tuple[QuantPair, Overlay, str]]:
    pairs, overlays = _tables()
    for overlay in overlays:  # the plain formats first
        for pair in pairs:
            if (pair.weight, pair.activation) == (weight, activation):
                variants = FP4_VARIANTS if isinstance(pair.format, Mapping) else FP4_VARIANTS[:1]
                yield from ((pair, overlay, variant) for variant in variants)


@cache
def _tables() -> tuple[list[QuantPair], list[Overlay]]:
    return load_pairs(), load_overlays()


def _key(format: Format) -> str:
    cfgs = {
        q: config_hash({"quant_cfg": [{"quantizer_name": f"*{q}", "cfg": cfg}], "algorithm": None})
        for q, cfg in format.linear.cfgs.items()
        if cfg is not None
    }
    return json.dumps([cfgs, plain(algorithm_settings(format.config["algorithm"]))], sort_keys=True)


def _new(format: Format, origin: str) -> Candidate:
    linear = format.linear
    weight, activation = (precision(linear.cfgs[q]) for q in (WEIGHT, INPUT))
    algorithm = format.config["algorithm"]
    method = algorithm["method"] if isinstance(algorithm, Mapping) else algorithm
    name = f"w{weight}_a{activation}" + (f"_{method}" if isinstance(method, str) and method != "max" else "")
    digest = config_hash(format.config)
    name = f"{name}.{digest[:4]}"  # never the name of a shipped pair, which means other numerics
    info = CandidateInfo(
        name=name,
        quant_pair=name,
        granularity="default",
        format_name=origin,
        weight_precision=weight,
        activation_precision=activation,
        config=plain(format.config),
        config_hash=digest,
        bits=weight_bits(linear),
        bits_modelopt=modelopt_bits(linear),
        adjustments=format.adjustments,
    )
    return Candidate(info, Format(origin, format.config, format.adjustments))


def _renamed(candidate: Candidate, number: int) -> Candidate:
    from dataclasses import replace

    name = f"{candidate.info.name}.{candidate.info.config_hash[:4]}"
    return replace(candidate, info=replace(candidate.info, name=name, quant_pair=name))


def modelopt_cost(config: Config) -> float:
    """Bits per weight of a candidate format as ModelOpt's search counts them."""
    from modelopt.torch.quantization.algorithms import estimate_quant_compression
    from modelopt.torch.quantization.config import QuantizeConfig

    return 16 * float(estimate_quant_compression(QuantizeConfig(**config)))


def config_of(given: QuantizeConfig) -> Config:
    """A ``QuantizeConfig`` as the dict that ``mtq`` takes."""
    dumped = given.model_dump(exclude_unset=True)
    entries: list[JsonObject] = []
    for entry in dumped["quant_cfg"]:
        cfg, on = entry.get("cfg"), entry.get("enable", True)
        kept = {k: entry[k] for k in ("quantizer_name", "parent_class") if entry.get(k) is not None}
        if cfg is not None:
            kept["cfg"] = _trimmed(cfg)
        entries.append(kept if on and cfg is not None else {**kept, "enable": on})
    config = {"quant_cfg": entries, "algorithm": _algorithm(dumped.get("algorithm", "max"))}
    if dumped.get("effective_bits") is not None:
        config["effective_bits"] = dumped["effective_bits"]
    return config


def _algorithm(given: object) -> object:
    """The calibration algorithm; one without settings as its bare name."""
    if isinstance(given, list):
        return [_algorithm(step) for step in given]
    if not isinstance(given, Mapping):
        return given
    ((_, settings),) = algorithm_settings(given)
    return {"method": given["method"], **settings} if settings else str(given["method"])


def _trimmed(cfg: JsonObject | list[JsonObject]) -> JsonObject | list[JsonObject]:
    """Quantizer attributes without those that are ModelOpt's defaults (overrides spell out all of them)."""
    return [_without_defaults(stage) for stage in cfg] if isinstance(cfg, list) else _without_defaults(cfg)


def _without_defaults(cfg: JsonObject) -> JsonObject:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    given: JsonObject = QuantizerAttributeConfig.model_validate(cfg).model_dump(exclude_defaults=True)
    return {"num_bits": cfg["num_bits"], **given} if "num_bits" in cfg else given
