"""A model made of an exported checkpoint alone: weights dequantized by our reader, inputs rounded as labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from layerbits.checkpoint.dequantize import dequantize, logical_shape, quantize_input
from layerbits.checkpoint.experts import ExpertLinear, expert_linears
from layerbits.checkpoint.label import Label
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.scored import ScoredLayer
from layerbits.errors import UserError
from layerbits.inputs.names import names_on_disk
from layerbits.inputs.prediction_layers import prediction_module
from layerbits.scoring import quantizers
from layerbits.scoring.assigned import change_inputs
from layerbits.scoring.experts import Change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_LOADED = ("pre_quant_scale", "k_scale", "v_scale")


def restore(checkpoint: Checkpoint, quantization: Quantization, device: str, trusted: bool = False) -> PreTrainedModel:
    """Builds the model of ``config.json`` and fills it with the checkpoint's weights; ``model(**inputs)`` runs.

    Piece by piece, so that little more than the model is in memory. The KV cache is left in the model's dtype.

    Args:
        checkpoint: The export.
        quantization: What :func:`layerbits.checkpoint.quantization.read_quantization` read from it.
        device: ``cpu`` or ``cuda``.
        trusted: ``model.trust_remote_code`` of the model that was scored: its code lies beside the checkpoint.

    Raises:
        UserError: A weight of the model is not in the checkpoint, or the reverse.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    from layerbits.inputs.models import build

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trusted)
    del config.quantization_config
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    with no_init_weights(), torch.device(device):
        model = build(config, dtype)
    with init_empty_weights(include_buffers=False):
        shell = build(config, dtype)
    for (
        name,
        buffer,
    ) in shell.named_buffers():  # made on the CPU, as from_pretrained does: rotary tables differ in a bit
        model.get_buffer(name).copy_(buffer)
    model.tie_weights()
    model.eval()
    model.config.use_cache = False
    own = {f"{module}.weight" for module in quantization.layers}  # by their names in memory, maybe
    names = {name: name if name in own else stored for name, stored in names_on_disk(model).items()}
    experts = expert_linears(model)
    _fill(model, checkpoint, quantization, names, experts)
    stored = {name.removesuffix(".weight"): on_disk for name, on_disk in names.items()}
    for name, _ in model.named_modules():
        layer = stored.get(name, "").removesuffix(".weight")
        if layer in quantization.layers:
            change_inputs(model, name, {"": _rounding(checkpoint, layer, quantization.layers[layer])})
    changes: dict[str, dict[str, Change]] = {}
    for expert in experts:
        if expert.name in quantization.layers and expert.projection not in changes.setdefault(expert.module, {}):
            rounding = _rounding(checkpoint, expert.name, quantization.layers[expert.name])
            changes[expert.module][expert.projection] = rounding
    for name, change in changes.items():
        change_inputs(model, name, change)
    return model


def at_stored_numbers(
    model: PreTrainedModel, checkpoint: Checkpoint, quantization: Quantization, layers: Sequence[ScoredLayer]
) -> PreTrainedModel:
    """Gives the source's model the checkpoint's quantized weights, and ModelOpt's input quantizers at its scales.

    What the restored model has to compute bit for bit, if its configuration, its other tensors and our reading of the
    labels' activations are right.

    Args:
        model: Loaded from the source; changed in place.
        checkpoint: The export.
        quantization: Its configuration.
        layers: The quantized linears.
    """
    changes: dict[str, dict[str, Change]] = {}
    for layer in layers:
        expert, label = layer.expert, quantization.layers[layer.exported]
        if expert is None:
            name, site = layer.module, ""
            weight = model.get_submodule(name).weight
        else:
            name, site = expert.module, expert.projection
            weight = expert.rows(getattr(model.get_submodule(name), site))
        _fill_quantized(checkpoint, layer.exported, label, weight)
        of_module = changes.setdefault(name, {})
        quantizer = quantizers.make_quantizer(layer.inputs, weight.device)
        if quantizer is None or site in of_module:  # experts share the scale of their inputs
            continue
        if (scale := label.input_scale) is not None:
            stored = checkpoint.rows(f"{layer.exported}.{scale.part}").to(weight.device)
            quantizer.amax = scale.range(stored).reshape(())
        of_module[site] = quantizer
    for name, change in changes.items():
        change_inputs(model, name, change)
    return model


def _fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    quantization: Quantization,
    names: Mapping[str, str],
    experts: Sequence[ExpertLinear],
) -> None:
    tensors = model.state_dict()
    used, filled, missing = set(), set(), []
    for expert in experts:
        weight = expert.rows(tensors[f"{expert.module}.{expert.projection}"])
        used |= _fill_linear(checkpoint, quantization, expert.name, weight)
    for expert in experts:
        tensors.pop(f"{expert.module}.{expert.projection}", None)
    for name, tensor in tensors.items():
        stored = names.get(name, name)
        module = stored.removesuffix(".weight")
        label = quantization.layers.get(module) if stored.endswith(".weight") else None
        if label is None and stored not in checkpoint:
            missing.append(name)
            continue
        with torch.no_grad():
            if label is not None:
                _check_shape(checkpoint, stored, logical_shape(checkpoint, module, label), tensor)
                _fill_quantized(checkpoint, module, label, tensor)
            else:
                _check_shape(checkpoint, stored, checkpoint.entry(stored).shape, tensor)
                for start, stop in checkpoint.pieces(stored):
                    part = checkpoint.rows(stored, start, stop)
                    (tensor[start:stop] if tensor.dim() else tensor).copy_(part)
        used |= {stored} if label is None else {f"{module}.{part}" for part in label.parts}
        filled.add(tensor.data_ptr())
    if lost := [name for name in missing if tensors[name].data_ptr() not in filled]:  # the others are tied
        raise UserError(f"{checkpoint.folder} lacks {lost[0]}, which its config.json asks for; export it again")
    left = (n for n in checkpoint.entries if n not in used and n.rpartition(".")[2] not in _NOT_LOADED)
    if extra := next((n for n in left if prediction_module(n, model.config) is None), None):
        raise UserError(f"{checkpoint.folder} has {extra}, which its config.json has no place for; export it again")


def _fill_linear(checkpoint: Checkpoint, quantization: Quantization, module: str, weight: torch.Tensor) -> set[str]:
    """Fills a weight from a linear of the checkpoint; returns the names of the tensors that were read."""
    label, stored = quantization.layers.get(module), f"{module}.weight"
    with torch.no_grad():
        if label is None:
            _check_shape(checkpoint, stored, checkpoint.entry(stored).shape, weight)
            for start, stop in checkpoint.pieces(stored):
                weight[start:stop].copy_(checkpoint.rows(stored, start, stop))
            return {stored}
        _check_shape(checkpoint, stored, logical_shape(checkpoint, module, label), weight)
        _fill_quantized(checkpoint, module, label, weight)
    return {f"{module}.{part}" for part in label.parts}


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{checkpoint.folder}: {name} is {list(shape)}, its config.json says {list(tensor.shape)}; export it again"
        )


def _even_pieces(checkpoint: Checkpoint, module: str, label: Label) -> list[tuple[int, int]]:
    factor = label.layout.packed[0]
    pieces = checkpoint.pieces(f"{module}.{label.layout.tensor}")
    return [(start * factor, stop * factor) for start, stop in pieces]


def _fill_quantized(checkpoint: Checkpoint, module: str, label: Label, weight: torch.Tensor) -> None:
    """Fills a weight from the quantized one of a linear of the checkpoint, piece by piece."""
    with torch.no_grad():
        for start, stop in _even_pieces(checkpoint, module, label):
            weight[start:stop] = dequantize(checkpoint, module, label, start, stop, weight.device)


def _rounding(checkpoint: Checkpoint, layer: str, label: Label) -> Change:
    scale = None if label.input_scale is None else checkpoint.rows(f"{layer}.{label.input_scale.part}")

    def rounded(x: torch.Tensor) -> torch.Tensor:
        quantized = quantize_input(x, label, scale)
        return (
            x + (quantized - x).detach() if x.requires_grad else quantized
        )  # the gradient as if there was no rounding

    return rounded
