"""What a checkpoint's files say of themselves, and whether they agree: needs no model and no runtime."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from layerbits.checkpoint.dequantize import check_parts
from layerbits.checkpoint.labels import Label, label_of_layer
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import UserError

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that runtimes run as one."""

_PACKED = (torch.uint8, torch.int8, torch.float8_e4m3fn)
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale", "pre_quant_scale")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``detail`` says what was found, or the first thing that is wrong."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantization configuration.

    Attributes:
        layers: Quantized module, named as in the checkpoint → label.
        exclude: Patterns of modules that stay as they are; empty for mixed precision, which lists the others.
        kv_cache: ``FP8`` or ``None``.
        mixed: Whether every layer is listed with its own label.
    """

    layers: Mapping[str, Label]
    exclude: tuple[str, ...]
    kv_cache: str | None
    mixed: bool


def read_quantization(checkpoint: Checkpoint) -> Quantization:
    """Reads ``hf_quant_config.json``.

    Raises:
        UserError: It is missing or damaged, or has a label that is not understood.
    """
    details = _json(checkpoint.folder / "hf_quant_config.json").get("quantization", {})
    mixed = details.get("quant_algo") == "MIXED_PRECISION"
    if mixed:
        layers = {name: label_of_layer(layer) for name, layer in details.get("quantized_layers", {}).items()}
    else:
        label = label_of_layer(details)
        layers = {n.removesuffix(".weight"): label for n, e in checkpoint.entries.items() if e.dtype in _PACKED}
        layers = {n: label for n in layers if f"{n}.weight" in checkpoint}
    exclude = tuple(details.get("exclude_modules") or ())
    return Quantization(layers, exclude, details.get("kv_cache_quant_algo"), mixed)


def check_structure(checkpoint: Checkpoint) -> tuple[Check, ...]:
    """Everything that can be checked on the files alone.

    Raises:
        UserError: The quantization configuration cannot be read at all.
    """
    quantization = read_quantization(checkpoint)
    return (
        _check("config.json names the model and repeats the quantization", _config(checkpoint.folder)),
        _check("the quantization config names real modules", _real_modules(checkpoint, quantization)),
        _check("every linear is either labelled or excluded", _covered(checkpoint, quantization)),
        _check("every quantized tensor has its scales", _complete(checkpoint, quantization)),
        _check("scales are finite and positive", _positive(checkpoint)),
        _check("fused siblings share an algorithm and its scales", _siblings(checkpoint, quantization)),
        _check("the KV cache has its scales", _kv_cache(checkpoint, quantization)),
    )


def require(checks: Iterable[Check]) -> None:
    """Raises on the first failed check.

    Raises:
        UserError: A check failed.
    """
    for check in checks:
        if not check.passed:
            raise UserError(f"the checkpoint is not sound: {check.name} - not so: {check.detail}")


def _check(name: str, problems: Iterator[str]) -> Check:
    try:
        first = next(problems, None)
    except UserError as error:
        first = str(error)
    return Check(name, first is None, first or "so")


def _config(folder: Path) -> Iterator[str]:
    config = _json(folder / "config.json")
    if not config.get("architectures"):
        yield "config.json has no architectures"
    embedded = config.get("quantization_config") or {}
    details = _json(folder / "hf_quant_config.json").get("quantization", {})
    if embedded.get("quant_algo") != details.get("quant_algo"):
        yield f"config.json says {embedded.get('quant_algo')}, hf_quant_config.json {details.get('quant_algo')}"
    if embedded.get("quantized_layers") != details.get("quantized_layers"):
        yield "config.json and hf_quant_config.json list different layers"
    if list(embedded.get("ignore") or ()) != list(details.get("exclude_modules") or ()):
        yield "config.json and hf_quant_config.json exclude different modules"


def _real_modules(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for module in quantization.layers:
        if f"{module}.weight" not in checkpoint:
            yield f"{module} is labelled but has no weight"
    modules = {name.rpartition(".")[0] for name in checkpoint.entries}
    prefixes = {module[: match.start()] for module in modules for match in re.finditer(r"\.|$", module)}
    tied = {"lm_head"}  # has no tensor of its own where it is the embedding
    for pattern in quantization.exclude:
        if not any(fnmatchcase(name, pattern) for name in prefixes | modules | tied):
            yield f"the excluded {pattern} matches no module"
        if wrong := next((m for m in quantization.layers if fnmatchcase(m, pattern)), None):
            yield f"the excluded {pattern} matches {wrong}, which is quantized"


def _covered(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module in quantization.layers:
            continue
        if entry.dtype in _PACKED:
            yield f"{name} is {entry.dtype} but the config does not label it"
        linear = len(entry.shape) == 2 and "embed" not in module
        if linear and not quantization.mixed and not any(fnmatchcase(module, p) for p in quantization.exclude):
            yield f"{module} is not quantized, and no pattern excludes it: a runtime would look for its scales"


def _complete(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for module, label in quantization.layers.items():
        check_parts(checkpoint, module, label)
        expected = {"weight_scale", "weight_scale_2" if label.second_divisor else "", "pre_quant_scale"}
        expected |= {"input_scale"} if label.input_divisor is not None else set()
        if extra := next((s for s in _SCALES[:3] if s not in expected and f"{module}.{s}" in checkpoint), None):
            yield f"{module} is labelled {label.algo} but has a {extra}"
    for name in checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        if leaf in _SCALES[:3] and module not in quantization.layers:
            yield f"{name} belongs to no quantized module"
    if not quantization.layers:
        yield "nothing is quantized"


def _positive(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.entries:
        leaf = name.rpartition(".")[2]
        if leaf not in _SCALES:
            continue
        for start, stop in checkpoint.pieces(name):
            values = checkpoint.rows(name, start, stop)
            if values.dtype == torch.uint8:
                sound = values < 255  # E8M0's NaN
            else:
                sound = torch.isfinite(values.float()) & (values.float() > 0)
            if not bool(sound.all()):
                yield f"{name} has a value that is zero, negative or not finite"
            if leaf == "pre_quant_scale" and not bool((values == 1).all()):
                yield f"{name} is not one everywhere: the inputs were not scored with a smoothing"


def _siblings(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    families: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for family in FUSED:
            if leaf == "weight" and last in family:
                families[parent, family].append(module)
    for modules in families.values():
        labels = {quantization.layers[m].algo if m in quantization.layers else None for m in modules}
        if len(labels) > 1:
            yield f"{', '.join(modules)} have different algorithms {sorted(map(str, labels))}"
        for part in ("input_scale", "weight_scale_2"):
            values = {float(checkpoint.rows(f"{m}.{part}")) for m in modules if f"{m}.{part}" in checkpoint}
            if len(values) > 1:
                yield f"{', '.join(modules)} have different {part}"


def _kv_cache(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    scales = {n for n in checkpoint.entries if n.endswith((".k_scale", ".v_scale"))}
    if quantization.kv_cache is None:
        if scales:
            yield f"{min(scales)} is there, but the config has no KV cache algorithm"
        return
    if quantization.kv_cache != "FP8":
        yield f"kv_cache_quant_algo {quantization.kv_cache} is not known here"
    attentions = {s.rpartition(".")[0].rpartition(".")[0] for s in scales}
    if not attentions:
        yield "the config says FP8, no k_scale is there"
    for attention in sorted(attentions):
        for part in ("k", "v"):
            if f"{attention}.{part}_proj.{part}_scale" not in scales:
                yield f"{attention} has no {part}_scale"


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; it is not a ModelOpt export") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object; export it again")
    return value
