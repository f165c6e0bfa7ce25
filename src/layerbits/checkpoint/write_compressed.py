"""A compressed-tensors checkpoint: weights packed by that library, everything else copied from the source's files.

The library quantizes as it packs. It gets the fake-quantized weights in float32 with the scales that are stored, so
that its rounding finds every value where it is; block scales of FP4 are made from the weights by the rule of the
kernels that scored. Nothing of the loaded model is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layerbits.candidates import fp4, mxfp8
from layerbits.checkpoint import compressed
from layerbits.checkpoint.compare import fake_quantized
from layerbits.checkpoint.files import copy_files, read_json
from layerbits.checkpoint.label import Label
from layerbits.checkpoint.reader import INDEX, Checkpoint
from layerbits.checkpoint.scored import ScoredLayer

SHARD_BYTES = 5_000_000_000

Tensors = Iterator[tuple[str, torch.Tensor]]


def write_compressed(
    model: Any, layers: Sequence[ScoredLayer], folder: Path, source: Checkpoint, on_disk: Mapping[str, str]
) -> None:
    """Writes the checkpoint.

    Args:
        model: The whole model, unquantized.
        layers: The quantized linears, from :func:`layerbits.checkpoint.scored.scored_layers`.
        folder: Where to; exists.
        source: The checkpoint that was scored.
        on_disk: From :func:`layerbits.checkpoint.names.names_on_disk`.
    """
    _write_shards(_tensors(model, layers, source, on_disk), folder)
    copy_files(source.folder, folder)
    config = read_json(source.folder / "config.json")
    config.setdefault("architectures", [type(model).__name__])
    _set_dtype(config, str(model.dtype).removeprefix("torch."))
    config["quantization_config"] = _quantization_config(model, layers, on_disk)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


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


def _tensors(model: Any, layers: Sequence[ScoredLayer], source: Checkpoint, on_disk: Mapping[str, str]) -> Tensors:
    quantized = {f"{layer.stored}.weight": layer for layer in layers}
    dtypes = {on_disk[name]: tensor.dtype for name, tensor in model.state_dict().items()}
    for name in source.entries:
        if (layer := quantized.get(name)) is not None:
            with torch.no_grad():
                for part, tensor in packed(layer, model.get_submodule(layer.module).weight).items():
                    yield f"{layer.exported}.{part}", tensor
        elif name in dtypes:  # what the model does not load stays behind
            yield name, source.rows(name).to(dtypes[name])


def _write_shards(tensors: Tensors, folder: Path) -> None:
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        size = 0

    for name, tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if held and size + length > SHARD_BYTES:
            flush()
        held[name] = tensor
        total, size = total + length, size + length
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.safetensors").rename(folder / file)
        where |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n", "utf-8"
    )


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype


def _quantization_config(model: Any, layers: Sequence[ScoredLayer], on_disk: Mapping[str, str]) -> dict[str, Any]:
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    by_label: dict[Label, list[str]] = {}
    for layer in layers:
        by_label.setdefault(layer.label, []).extend(dict.fromkeys((layer.stored, layer.module)))
    several = len(by_label) > 1
    groups = {
        f"group_{i}": QuantizationScheme(targets=names if several else ["Linear"], **compressed.scheme_of(label))
        for i, (label, names) in enumerate(by_label.items())
    }
    formats = {compressed.storage(label) for label in by_label}
    config = QuantizationConfig(
        config_groups=dict(groups),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_ignored(model, layers, on_disk),
    )
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}


def _ignored(model: Any, layers: Sequence[ScoredLayer], on_disk: Mapping[str, str]) -> list[str]:
    """Linears that stay as they are, by both of their names; all of a tower without a quantized one by a pattern."""
    quantized = {layer.module for layer in layers}
    words = {word for name in quantized for word in name.split(".")}
    ignored: dict[str, None] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # routers are linears to a runtime, whatever their class is
        if isinstance(module, torch.nn.Embedding) or getattr(weight, "ndim", 0) != 2 or name in quantized:
            continue
        parts = name.split(".")
        tower = next((part for part in parts[:-1] if part not in words), None)
        if tower is not None and not tower.isdigit():
            ignored[rf"re:(.*\.)?{tower}\..*"] = None
            continue
        stored = on_disk.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        ignored |= dict.fromkeys((stored, name))
    return list(ignored)
