"""A scheme as an llm-compressor recipe: one ``QuantizationModifier`` with a config group per candidate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.candidates.linear import E4M3, E8M0, FP4, FP8, INPUT, WEIGHT, block_lengths, read_config
from layerbits.errors import Unsupported
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.result import CandidateInfo
from layerbits.schemes.ptq_recipe import integer_dimensions
from layerbits.schemes.scheme import Scheme

_VISION = ("re:.*visual.*", "re:.*vision_tower.*", "re:.*vision_model.*", "re:.*multi_modal_projector.*")


def compressor_recipe(scheme: Scheme) -> dict[str, object]:
    """The recipe as plain data.

    Targets are regular expressions over module names, one per kind of linear, with the blocks that it covers; every
    linear that the scheme leaves alone is under ``ignore``, and so are the output head and vision towers.

    Args:
        scheme: The scheme.

    Raises:
        Unsupported: compressed-tensors has no such scheme: a scale per input channel, a search of weight ranges, a
            quantizer in stages, or a kernel of our own.
    """
    if experts := next((m for m in scheme.modules if m.endswith(".experts")), None):
        raise Unsupported(
            f"scheme {scheme.name} quantizes {experts}, which keeps all experts in one tensor, and llm-compressor's "
            "targets are linears; use the ModelOpt recipe"
        )
    groups: dict[str, object] = {}
    for number, info in enumerate(scheme.candidates):
        modules = [module for module, mine in scheme.modules.items() if mine.name == info.name]
        groups[f"group_{number}"] = {"targets": _patterns(modules), **_arguments(info, scheme.name)}
    head = [] if any(module.endswith("lm_head") for module in scheme.modules) else ["lm_head"]
    vision = [p for p in _VISION if not any(re.match(p.removeprefix("re:"), m) for m in scheme.modules)]
    ignore = [*head, *vision, *_patterns(scheme.exclude)]
    modifier: dict[str, object] = {"ignore": ignore, "config_groups": groups}
    if scheme.kv_cache != NO_CACHE:
        settings = KV_FORMATS[scheme.kv_cache]
        cache = None if "use_constant_amax" in settings else _one(settings, INPUT)
        if cache is None or cache["strategy"] != "tensor":
            raise Unsupported(
                f"scheme {scheme.name}: llm-compressor has no {scheme.kv_cache} KV cache; use kv_cache=fp8 or none"
            )
        modifier["kv_cache_scheme"] = cache
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}


def compressor_recipe_yaml(scheme: Scheme) -> str:
    """The recipe as a file.

    Raises:
        Unsupported: As :func:`compressor_recipe`.
    """
    usage = '#   oneshot(model="MODEL", recipe="THIS_FILE", dataset=...)\n'
    return scheme.heading + usage + yaml.safe_dump(compressor_recipe(scheme), sort_keys=False, width=120)


def _arguments(info: CandidateInfo, name: str) -> JsonObject:
    """``QuantizationArgs`` of weights and activations, in the words of compressed-tensors."""
    algorithm = info.config.get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    if method not in (None, "max"):
        raise Unsupported(
            f"scheme {name}: {info.name} is calibrated by {method}, which llm-compressor's QuantizationModifier is "
            "not; export it with ModelOpt"
        )
    linear = read_config(info.config)
    words = {}
    for quantizer, key in ((WEIGHT, "weights"), (INPUT, "input_activations")):
        cfg = linear.cfgs[quantizer]
        if cfg is None:
            continue
        why = "in stages" if isinstance(cfg, list) else None
        made = None if isinstance(cfg, list) else _one(cfg, quantizer)
        if made is None:
            raise Unsupported(
                f"scheme {name}: the {key} of {info.name} are quantized in a way that compressed-tensors has no word "
                f"for ({why or 'their scales'}); make the scheme of other candidates"
            )
        words[key] = made
    return words


def _one(cfg: JsonMapping, quantizer: str) -> JsonObject | None:
    bits = cfg.get("num_bits", 8)
    blocks = cfg.get("block_sizes") or {}
    lengths = {int(k): v for k, v in block_lengths({"block_sizes": integer_dimensions(blocks)}).items()}
    scale = tuple(blocks["scale_bits"]) if blocks.get("scale_bits") else None
    number = sum(bits) + 1 if isinstance(bits, tuple | list) else bits
    if isinstance(bits, tuple | list) and tuple(bits) not in (FP8, FP4):
        return None
    made: JsonObject = {"num_bits": number, "type": "float" if isinstance(bits, tuple | list) else "int"}
    made["symmetric"] = True
    if scale is not None:
        if lengths.keys() != {-1} or scale not in (E8M0, E4M3):
            return None
        nvfp4 = scale == E4M3
        dtype = "torch.float8_e4m3fn" if nvfp4 else "torch.uint8"
        made |= {"strategy": "tensor_group" if nvfp4 else "group", "group_size": lengths[-1]}
        made |= {"scale_dtype": dtype, "zp_dtype": dtype}
        return made | {"dynamic": ("local" if nvfp4 else True) if quantizer == INPUT else False}
    dynamic = "dynamic" in (cfg.get("type"), blocks.get("type"))
    if lengths == {-1: None}:
        return made | {"strategy": "token", "dynamic": dynamic} if quantizer == INPUT and dynamic else None
    if lengths.keys() == {-1}:
        return made | {"strategy": "group", "group_size": lengths[-1], "dynamic": dynamic}
    if lengths:
        return None
    axis = cfg.get("axis")
    if axis is None:
        return made | {"strategy": "tensor", "dynamic": dynamic}
    return made | {"strategy": "channel", "dynamic": False} if quantizer == WEIGHT and axis == 0 else None


def _patterns(modules: Sequence[str]) -> list[str]:
    """Names of linears, those of one place in their block as one regular expression over the blocks."""
    places: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        match = re.match(r"(.*?\.)(\d+)(\..*)", module)
        key = (match[1], match[3]) if match else (module, "")
        places.setdefault(key, []).append(match[2] if match else "")
    patterns = []
    for (before, after), blocks in places.items():
        if not after:
            patterns.append(before)
            continue
        which = blocks[0] if len(blocks) == 1 else f"({'|'.join(blocks)})"
        patterns.append(f"re:.*{re.escape(_tail(before))}{which}{re.escape(after)}$")
    return patterns


def _tail(before: str) -> str:
    """The last names of a path: enough to tell the language model, and the same in whole models and parts of them."""
    parts = before.split(".")
    return ".".join(parts[-3:]) if "language_model" in before else ".".join(parts[-2:])
