"""Bytes of the checkpoints of a source's schemes, by arithmetic, in each format that they may be exported in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.checkpoint.label import FORMATS, MODELOPT, Label
from layerbits.checkpoint.runtimes import only_alone, reads
from layerbits.errors import UserError
from layerbits.inputs.cache_size import attention_layers, cached_numbers
from layerbits.inputs.experts import named_experts
from layerbits.results.result import FloatArray, Group
from layerbits.schemes.sizes import Load, Sizes, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.models import ResolvedModel, Shapes
    from layerbits.schemes.source import Source

_CACHE_BITS = 16.0
"""Of a number in a KV cache that is not quantized; vLLM makes bfloat16 of a float32 model."""

_FOLDED = ("qkv", "gate_up")
"""Kinds of group behind a norm, into which ModelOpt folds the smoothing that ``W4A16_AWQ`` promises (one everywhere).

It writes the others' beside their weights.
"""


def with_sizes(source: Source, load: Load) -> Source:
    """A source whose schemes can be measured in bytes; the model's files are looked at, and no weight is read.

    Raises:
        UserError: The scores do not say how to find the model, it has changed since, or the load is more than it takes.
    """
    resolved, model, linears = scored_model(source, "budget_gib")
    return replace(source, sizes=sizes_of(resolved, model, linears, source, load))


def scored_model(source: Source, needed_by: str) -> tuple[ResolvedModel, PreTrainedModel, dict[str, Shapes]]:
    """The model that was scored, without numbers, and its scored linears; no weight is read.

    Args:
        source: The scores.
        needed_by: What the user asked for.

    Raises:
        UserError: The scores do not say how to find the model, or it has changed since.
    """
    from layerbits.inputs.loading import empty_model
    from layerbits.inputs.model_spec import ModelSpec
    from layerbits.inputs.models import resolve, scored_linears

    if "model" not in source.settings:
        raise UserError(
            f"{needed_by} needs the model, and the scores do not say how to load it; "
            "score it with experiments/sensitivity.py"
        )
    resolved = resolve(ModelSpec.from_mapping(source.settings["model"]))
    if resolved.revision != source.model.revision:
        raise UserError(
            f"the scores are of {source.model.name} revision {source.model.revision}, the model here is revision "
            f"{resolved.revision}; score this one, or use the model that was scored"
        )
    model = empty_model(resolved)
    return resolved, model, scored_linears(model, resolved.spec)


def sizes_of(
    resolved: ResolvedModel, model: PreTrainedModel, linears: Mapping[str, Shapes], source: Source, load: Load
) -> Sizes:
    """The sizes of a source's schemes.

    Args:
        resolved: The model that was scored.
        model: It, without numbers.
        linears: From :func:`layerbits.inputs.models.scored_linears`.
        source: Groups, candidates and the KV cache.
        load: What is served at once.

    Raises:
        UserError: The context is longer than the model's.
    """
    from layerbits.checkpoint.labels import label_or_reason

    fp8_cache = source.kv_cache == "fp8"
    weights = _weights(model, source.groups, linears)
    experts = bool(named_experts(model))  # scored or not: ModelOpt's format alone has them
    formats = {}
    for name in (MODELOPT,) if experts or fp8_cache else FORMATS:
        rest = _whole(resolved, model, name) - sum(rows * columns * size for g in weights for rows, columns, size in g)
        rest += 2 * 4 * len(attention_layers(resolved.config)) if fp8_cache else 0  # a scale of keys, one of values
        labels = [label_or_reason(info, name)[0] for info in source.candidates]
        served = {i.name: label for i, label in zip(source.candidates, labels, strict=True) if label and reads(label)}
        alone = frozenset(one for one, label in served.items() if only_alone(label))
        smoothed = [group.kind not in _FOLDED for group in source.groups]
        formats[name] = Stored(rest, _choices(weights, labels, smoothed), frozenset(served), alone)
    bits = _CACHE_BITS if source.kv_cache == NO_CACHE else _bits(source.kv_cache)
    cached = cached_numbers(resolved.config, load.context) * load.concurrency * bits / 8
    return Sizes(tuple(c.name for c in source.candidates), formats, math.ceil(cached), load)


def _choices(
    weights: Sequence[Sequence[tuple[int, int, int]]], labels: Sequence[Label | None], smoothed: Sequence[bool]
) -> FloatArray:
    """``[G, K]`` bytes; infinite where there is no label, or a weight does not fit it."""
    rows = []
    for group, smooth in zip(weights, smoothed, strict=True):
        each = [sum((_stored(label, *weight, smooth) for weight in group), start=0.0) for label in labels]
        rows.append([*each, float(sum(rows * columns * size for rows, columns, size in group))])
    return np.array(rows, dtype=np.float64).reshape(len(weights), len(labels) + 1)


def _stored(label: Label | None, rows: int, columns: int, size: int, smooth: bool) -> float:
    """Bytes of one linear's tensors under a label, its bias apart."""
    if label is None or columns % (label.layout.block or label.layout.packed[1]) or rows % label.layout.packed[0]:
        return math.inf
    parts = label.layout.parts(rows, columns).values()
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts)
    total += 0 if label.input_scale is None else label.input_scale.torch_dtype.itemsize
    return float(total + (columns * size if smooth and label.algo == "W4A16_AWQ" else 0))


def _weights(
    model: PreTrainedModel, groups: Sequence[Group], linears: Mapping[str, Shapes]
) -> list[list[tuple[int, int, int]]]:
    """Per group rows, columns and bytes of a number of each weight; an expert's are weights of their own."""
    from layerbits.checkpoint.experts import expert_linears

    experts: dict[str, list[tuple[int, int, int]]] = {}
    for one in expert_linears(model):
        tensor = getattr(model.get_submodule(one.module), one.projection)
        experts.setdefault(one.module, []).append((one.stop - one.start, tensor.shape[-1], tensor.dtype.itemsize))
    sizes = []
    for group in groups:
        mine: list[tuple[int, int, int]] = []
        for module in group.modules:
            if module in experts:
                mine += experts[module]
                continue
            if module not in linears:
                raise UserError(f"the model has no linear {module}; use the model that was scored")
            size = model.get_submodule(module).weight.dtype.itemsize
            # A convolution's shape is of its outputs and its width: all of its weights count in the first.
            numbers = model.get_submodule(module).weight.numel()
            mine.append((numbers // linears[module][0][1], linears[module][0][1], size))
        sizes.append(mine)
    return sizes


def _whole(resolved: ResolvedModel, model: PreTrainedModel, format: str) -> int:
    """Bytes of the checkpoint with nothing quantized: what the model loads, and layers for multi-token prediction."""
    from layerbits.checkpoint.reader import open_checkpoint
    from layerbits.inputs.names import names_on_disk
    from layerbits.inputs.prediction_layers import prediction_module
    from layerbits.inputs.weights import weight_files

    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = [*parameters.values(), *(t for name, t in model.state_dict().items() if name not in every)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    folder = Path(resolved.source)
    if resolved.spec.random_weights or not folder.is_dir() or weight_files(folder)[0].suffix != ".safetensors":
        return total
    entries = open_checkpoint(folder).entries
    ahead = (e for name, e in entries.items() if prediction_module(name, resolved.config) is not None)
    total += sum(entry.stop - entry.start for entry in ahead)
    if format != MODELOPT:  # tensors that are tied are copied as often as the files have them
        on_disk, state = names_on_disk(model), model.state_dict()
        tied = (name for name in every - set(parameters) if name in on_disk and name in state)
        again = [state[name] for name in tied if on_disk[name] in entries]
        total += sum(tensor.numel() * tensor.element_size() for tensor in again)
    return total


def _bits(kv_cache: str) -> float:
    settings = KV_FORMATS[kv_cache]
    return float(settings["effective_bits"]) if "effective_bits" in settings else 8.0
