"""A compressed-tensors checkpoint: weights packed by that library, everything else copied from the source's files.

The library quantizes as it packs. It gets the fake-quantized weights in float32 with the scales that are stored, so
that its rounding finds every value where it is; block scales of FP4 are made from the weights by the rule of the
kernels that scored. Nothing of the loaded model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from layerbits.candidates import fp4, mxfp8
from layerbits.checkpoint import compressed
from layerbits.checkpoint.compare import fake_quantized
from layerbits.checkpoint.config_file import write_config
from layerbits.checkpoint.files import copy_files
from layerbits.checkpoint.label import Label
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.scored import ScoredLayer
from layerbits.checkpoint.shards import write_shards
from layerbits.inputs.prediction_layers import prediction_module, prediction_modules
from layerbits.plain import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Tensors = Iterator[tuple[str, torch.Tensor]]


class Labelled(Protocol):
    """A quantized linear: its names in memory and in the source, and its label."""

    @property
    def module(self) -> str:
        """Name in memory."""

    @property
    def stored(self) -> str:
        """Name in the source."""

    @property
    def label(self) -> Label:
        """How it is stored."""


def write_compressed(
    model: PreTrainedModel, layers: Sequence[ScoredLayer], folder: Path, source: Checkpoint, on_disk: Mapping[str, str]
) -> None:
    """Writes the checkpoint.

    Args:
        model: The whole model, unquantized.
        layers: The quantized linears, from :func:`layerbits.checkpoint.scored.scored_layers`.
        folder: Where to; exists.
        source: The checkpoint that was scored.
        on_disk: From :func:`layerbits.inputs.names.names_on_disk`.
    """
    carried = prediction_modules(source.entries, model.config)
    write_shards(_tensors(model, layers, source, on_disk), folder)
    copy_files(source.folder, folder)
    write_config(
        source.folder,
        folder,
        quantization_config(model, layers, on_disk, carried),
        str(model.dtype).removeprefix("torch."),
        type(model).__name__,
    )


def packed(layer: ScoredLayer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear, by their names in its module.

    Args:
        layer: How it was scored.
        weight: Its weight, ``[rows, columns]``, on the device whose kernels quantize.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=[], **compressed.scheme_of(layer.label))
    rounded = fake_quantized(layer, weight, layer.stored_range, len(weight), 0, len(weight))
    state = {"weight": rounded.float().cpu(), **{k: v.cpu() for k, v in _scales(layer, weight).items()}}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    with torch.compiler.set_stance("force_eager"):  # the library compiles its rounding to FP4 on a CPU: 20 s, once
        made = compressor.compress(state, scheme)
    scale, second, inputs = layer.label.layout.scale, layer.label.layout.second, layer.label.input_scale
    made[scale.part] = made[scale.part].to(scale.torch_dtype)
    if second is not None:
        made[second.part] = made[second.part].to(second.torch_dtype)
    if inputs is not None:
        assert layer.input_range is not None
        made[inputs.part] = inputs.stored(layer.input_range).reshape(1).cpu()
    return {part: tensor.contiguous() for part, tensor in made.items()}


def _scales(layer: ScoredLayer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scales of a weight as the library takes them: numbers that are stored exactly, in float32."""
    layout = layer.label.layout
    amax = layer.scale_range
    shape = layout.scale.shape(weight.shape[0], weight.shape[1], layout.block)
    if layout.second is None and amax is not None:
        return {layout.scale.part: layout.scale.stored(amax).reshape(shape).float()}
    if layout.second is None:
        exponents = fp4.mxfp4_exponents(weight) if layout.dtype == "uint8" else mxfp8.mxfp8_exponents(weight)
        return {layout.scale.part: torch.exp2(exponents.float() - 127.0)}
    assert amax is not None
    return {
        layout.scale.part: fp4.nvfp4_scales(weight, amax).float(),
        layout.second.part: layout.second.stored(amax).reshape(1),
    }


def _tensors(
    model: PreTrainedModel, layers: Sequence[ScoredLayer], source: Checkpoint, on_disk: Mapping[str, str]
) -> Tensors:
    quantized = {f"{layer.stored}.weight": layer for layer in layers}
    dtypes = {on_disk[name]: tensor.dtype for name, tensor in model.state_dict().items()}
    for name in source.entries:
        if (layer := quantized.get(name)) is not None:
            with torch.no_grad():
                for part, tensor in packed(layer, model.get_submodule(layer.module).weight).items():
                    yield f"{layer.exported}.{part}", tensor
        elif name in dtypes:
            yield name, source.rows(name).to(dtypes[name])
        elif prediction_module(name, model.config) is not None:
            yield name, source.rows(name)
        # what else the model does not load stays behind


def quantization_config(
    model: PreTrainedModel, layers: Sequence[Labelled], on_disk: Mapping[str, str], carried: Sequence[str]
) -> JsonObject:
    """What ``config.json`` says of the quantization.

    Args:
        model: The whole model, with numbers or without.
        layers: The quantized linears.
        on_disk: From :func:`layerbits.inputs.names.names_on_disk`.
        carried: Modules for multi-token prediction.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    by_label: dict[Label, list[str]] = {}
    for layer in layers:
        by_label.setdefault(layer.label, []).extend(dict.fromkeys((layer.stored, layer.module)))
    several = len(by_label) > 1
    heads = {
        layer.label: compressed.head_target(layer.module)
        for layer in layers
        if model.get_submodule(layer.module) is model.get_output_embeddings()
    }
    groups = {
        f"group_{i}": QuantizationScheme(
            targets=[*(names if several else ["Linear"]), *([heads[label]] if label in heads else [])],
            **compressed.scheme_of(label),
        )
        for i, (label, names) in enumerate(by_label.items())
    }
    formats = {compressed.storage(label) for label in by_label}
    config = QuantizationConfig(
        config_groups=dict(groups),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[
            *_ignored(model, {layer.module for layer in layers}, on_disk),
            *_experts(model),
            *(rf"re:{re.escape(module)}(\..*)?$" for module in carried),
        ],
    )
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}


def _experts(model: PreTrainedModel) -> list[str]:
    """What vLLM finds routed experts by: a target that is all linears is one of theirs, too (``get_moe_method``)."""
    return [r"re:.*\.experts(\..*)?$"] if any(name.endswith(".experts") for name, _ in model.named_modules()) else []


def _ignored(model: PreTrainedModel, quantized: Collection[str], on_disk: Mapping[str, str]) -> list[str]:
    towers, names = left_alone(model, quantized, on_disk)
    return [rf"re:(.*\.)?{name}\..*" if name in towers else name for name in names]


def left_alone(
    model: PreTrainedModel, quantized: Collection[str], on_disk: Mapping[str, str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Linears that stay as they are.

    Args:
        model: The whole model, with numbers or without.
        quantized: Names in memory of the others.
        on_disk: From :func:`layerbits.inputs.names.names_on_disk`.

    Returns:
        Words in the names of modules without a quantized linear, and, in model order, these and both names of each
        other linear.
    """
    words = {word for name in quantized for word in name.split(".")}
    ignored: dict[str, None] = {}
    towers: dict[str, None] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # routers are linears to a runtime, whatever their class is
        if isinstance(module, torch.nn.Embedding) or getattr(weight, "ndim", 0) != 2 or name in quantized:
            continue
        parts = name.split(".")
        tower = next((part for part in parts[:-1] if part not in words), None)
        if tower is not None and not tower.isdigit():
            towers[tower] = ignored[tower] = None
            continue
        stored = on_disk.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        ignored |= dict.fromkeys((stored, name))
    return frozenset(towers), tuple(ignored)
