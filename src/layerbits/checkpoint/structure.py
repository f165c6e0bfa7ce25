"""What a checkpoint's files say of themselves, and whether they agree: needs no model and no runtime."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from layerbits.candidates.fused import fused
from layerbits.checkpoint import compressed, modelopt
from layerbits.checkpoint.dequantize import check_parts
from layerbits.checkpoint.expert_names import expert_module
from layerbits.checkpoint.files import read_json
from layerbits.checkpoint.label import COMPRESSED
from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import UserError

_PACKED = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn)
_OF_WEIGHTS = ("weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale")
_SCALES = (*_OF_WEIGHTS, "k_scale", "v_scale", "pre_quant_scale")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``detail`` says what was found, or the first thing that is wrong."""

    name: str
    passed: bool
    detail: str


def check_structure(checkpoint: Checkpoint) -> tuple[Check, ...]:
    """Everything that can be checked on the files alone.

    Raises:
        UserError: The quantization configuration cannot be read at all.
    """
    quantization = read_quantization(checkpoint)
    return (
        _check("config.json names the model and repeats the quantization", _config(checkpoint.folder, quantization)),
        _check("the quantization config names real modules", _real_modules(checkpoint, quantization)),
        _check("every linear is either labelled or excluded", _covered(checkpoint, quantization)),
        _check("experts that are not quantized are excluded", _experts_left_alone(checkpoint, quantization)),
        _check("every quantized tensor has its scales", _complete(checkpoint, quantization)),
        _check("scales are finite and positive", _positive(checkpoint)),
        _check("fused siblings share an algorithm and its scales", _siblings(checkpoint, quantization)),
        _check("no runtime has to requantize", _requantized(checkpoint, quantization)),
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


def _config(folder: Path, quantization: Quantization) -> Iterator[str]:
    if not read_json(folder / "config.json").get("architectures"):
        yield "config.json has no architectures"
    yield from (compressed if quantization.format == COMPRESSED else modelopt).config_problems(folder)


def _real_modules(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for module, label in quantization.layers.items():
        if f"{module}.{label.layout.tensor}" not in checkpoint:
            yield f"{module} is labelled but has no weight"
    modules = {name.rpartition(".")[0] for name in checkpoint.entries}
    prefixes = {module[: match.start()] for module in modules for match in re.finditer(r"\.|$", module)}
    tied = {"lm_head"}  # has no tensor of its own where it is the embedding
    tails = {compressed.tail(module) for module in modules} if quantization.format == COMPRESSED else set()
    for pattern in quantization.exclude:
        # transformers may have another name for a module in memory; both are excluded, as readers go by either.
        real = any(quantization.matches(n, pattern) for n in prefixes | modules | tied)
        if not real and not _ends_as(pattern, tails):
            yield f"the excluded {pattern} matches no module"
        if wrong := next((m for m in quantization.layers if quantization.matches(m, pattern)), None):
            yield f"the excluded {pattern} matches {wrong}, which is quantized"


def _ends_as(pattern: str, tails: Collection[tuple[str, ...]]) -> bool:
    """Whether a name ends as a module does, in two parts of it or more: in files it may have other parts before."""
    parts = tuple(pattern.split("."))
    return any(parts[i:] in tails for i in range(max(1, len(parts) - 1)))


def _covered(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "weight_packed") or module in quantization.layers:
            continue
        if entry.dtype in _PACKED:
            yield f"{name} is {entry.dtype} but the config does not label it"
        linear = len(entry.shape) == 2 and "embed" not in module
        if linear and not quantization.mixed and not any(quantization.matches(module, p) for p in quantization.exclude):
            yield f"{module} is not quantized, and no pattern excludes it: a runtime would look for its scales"


def _experts_left_alone(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    """VLLM looks beside routed experts for their label (``_resolve_quant_algo`` of its ``modelopt.py``)."""
    if not quantization.mixed or quantization.format == COMPRESSED:
        return  # a configuration of one label excludes what has none, compressed-tensors has names alone
    for module in sorted({expert_module(name) for name in checkpoint.entries} - {""}):
        excluded = any(quantization.matches(module, pattern) for pattern in quantization.exclude)
        if excluded or any(name.startswith(f"{module}.") for name in quantization.layers):
            continue
        beside = f"{module.rpartition('.')[0]}."
        if neighbour := next((name for name in quantization.layers if name.startswith(beside)), None):
            algo = quantization.layers[neighbour].algo
            yield f"{module} is not quantized and not excluded: vLLM takes it for {algo}, as {neighbour} is"


def _complete(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for module, label in quantization.layers.items():
        check_parts(checkpoint, module, label)
        if extra := next((s for s in _OF_WEIGHTS if s not in label.parts and f"{module}.{s}" in checkpoint), None):
            yield f"{module} is labelled {label.algo} but has a {extra}"
    for name in checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        if leaf in _OF_WEIGHTS and module not in quantization.layers:
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
    for modules in fused(n.rpartition(".")[0] for n in checkpoint.entries):
        labels = {quantization.layers[m].algo if m in quantization.layers else None for m in modules}
        if len(labels) > 1:
            yield f"{', '.join(modules)} have different algorithms {sorted(map(str, labels))}"
        for part in ("input_scale", "input_global_scale", "weight_scale_2", "weight_global_scale"):
            if _differ(checkpoint, modules, part):
                yield f"{', '.join(modules)} have different {part}"


def _requantized(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[str]:
    for modules in fused(m for m, label in quantization.layers.items() if label.one_scale):
        ranged = quantization.layers[modules[0]].layout.ranged
        if ranged is not None and _differ(checkpoint, modules, ranged.part):
            yield (
                f"{', '.join(modules)} have a {ranged.part} each: a runtime that fuses them brings them to the largest "
                "and rounds again"
            )


def _differ(checkpoint: Checkpoint, modules: Iterable[str], part: str) -> bool:
    return len({float(checkpoint.rows(f"{m}.{part}")) for m in modules if f"{m}.{part}" in checkpoint}) > 1


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
