"""A model made of an exported checkpoint alone: weights dequantized by our reader, inputs rounded as labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerbits.checkpoint.dequantize import dequantize, logical_shape, quantize_input
from layerbits.checkpoint.labels import Label
from layerbits.checkpoint.names import names_on_disk
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.scored import ScoredLayer
from layerbits.errors import UserError
from layerbits.scoring import quantizers

_NOT_LOADED = ("pre_quant_scale", "k_scale", "v_scale")


def restore(checkpoint: Checkpoint, quantization: Quantization, device: str) -> Any:
    """Builds the model of ``config.json`` and fills it with the checkpoint's weights; ``model(**inputs)`` runs.

    Piece by piece, so that little more than the model is in memory. The KV cache is left in the model's dtype.

    Args:
        checkpoint: The export.
        quantization: What :func:`layerbits.checkpoint.quantization.read_quantization` read from it.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: A weight of the model is not in the checkpoint, or the reverse.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    from layerbits.inputs.models import build

    config = AutoConfig.from_pretrained(checkpoint.folder)
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
    names = names_on_disk(model)
    _fill(model, checkpoint, quantization, names)
    stored = {name.removesuffix(".weight"): on_disk for name, on_disk in names.items()}
    for name, module in model.named_modules():
        layer = stored.get(name, "").removesuffix(".weight")
        if layer in quantization.layers:
            _round_inputs(module, checkpoint, layer, quantization.layers[layer])
    return model


def at_stored_numbers(
    model: Any, checkpoint: Checkpoint, quantization: Quantization, layers: Sequence[ScoredLayer]
) -> Any:
    """Gives the source's model the checkpoint's quantized weights, and ModelOpt's input quantizers at its scales.

    What the restored model has to compute bit for bit, if its configuration, its other tensors and our reading of the
    labels' activations are right.

    Args:
        model: Loaded from the source; changed in place.
        checkpoint: The export.
        quantization: Its configuration.
        layers: The quantized linears.
    """
    import torch

    for layer in layers:
        module, label = model.get_submodule(layer.module), quantization.layers[layer.stored]
        with torch.no_grad():
            for start, stop in _even_pieces(checkpoint, layer.stored, label):
                module.weight[start:stop] = dequantize(
                    checkpoint, layer.stored, label, start, stop, module.weight.device
                )
        quantizer = quantizers.make_quantizer(layer.inputs, module.weight.device)
        if quantizer is None:
            continue
        if (scale := label.input_scale) is not None:
            stored = checkpoint.rows(f"{layer.stored}.{scale.part}").to(module.weight.device)
            quantizer.amax = scale.range(stored).reshape(())
        module.register_forward_pre_hook(lambda _, args, quantizer=quantizer: (quantizer(args[0]), *args[1:]))
    return model


def _fill(model: Any, checkpoint: Checkpoint, quantization: Quantization, names: Mapping[str, str]) -> None:
    import torch

    tensors = model.state_dict()
    used, filled, missing = set(), set(), []
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
                for start, stop in _even_pieces(checkpoint, module, label):
                    tensor[start:stop] = dequantize(checkpoint, module, label, start, stop, tensor.device)
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
    if extra := next(left, None):
        raise UserError(f"{checkpoint.folder} has {extra}, which its config.json has no place for; export it again")


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], tensor: Any) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{checkpoint.folder}: {name} is {list(shape)}, its config.json says {list(tensor.shape)}; export it again"
        )


def _even_pieces(checkpoint: Checkpoint, module: str, label: Label) -> list[tuple[int, int]]:
    factor = label.layout.packed[0]
    pieces = checkpoint.pieces(f"{module}.{label.layout.tensor}")
    return [(start * factor, stop * factor) for start, stop in pieces]


def _round_inputs(module: Any, checkpoint: Checkpoint, layer: str, label: Label) -> None:
    scale = None if label.input_scale is None else checkpoint.rows(f"{layer}.{label.input_scale.part}")
    module.register_forward_pre_hook(lambda _module, args: (quantize_input(args[0], label, scale), *args[1:]))
