"""A model made of an exported checkpoint alone: weights dequantized by our reader, inputs rounded as labelled."""

from __future__ import annotations

from typing import Any

from layerbits.checkpoint.dequantize import dequantize, logical_shape, quantize_input
from layerbits.checkpoint.labels import Label
from layerbits.checkpoint.names import names_on_disk
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.structure import Quantization
from layerbits.errors import UserError

_NOT_LOADED = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")


def restore(checkpoint: Checkpoint, quantization: Quantization, device: str) -> Any:
    """Builds the model of ``config.json`` and gives it the checkpoint's weights; ``model(**inputs)`` runs.

    The KV cache is left in the model's dtype.

    Args:
        checkpoint: The export.
        quantization: What :func:`layerbits.checkpoint.structure.read_quantization` read from it.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: A weight of the model is not in the checkpoint, or the reverse.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    del config.quantization_config
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        None, config=config, state_dict=_weights(checkpoint, quantization, dtype), dtype=dtype, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise UserError(
                f"{checkpoint.folder} does not fit its config.json: {what.removesuffix('_keys')} "
                f"{min(map(str, info[what]))}"
            )
    model.eval().to(device)
    model.config.use_cache = False
    stored = {name.removesuffix(".weight"): on_disk for name, on_disk in names_on_disk(model).items()}
    for name, module in model.named_modules():
        layer = stored.get(name, "").removesuffix(".weight")
        if layer in quantization.layers:
            _round_inputs(module, checkpoint, layer, quantization.layers[layer])
    return model


def _weights(checkpoint: Checkpoint, quantization: Quantization, dtype: Any) -> dict[str, Any]:
    import torch

    weights = {}
    for name in checkpoint.entries:
        module, _, leaf = name.rpartition(".")
        label = quantization.layers.get(module)
        if label is not None and leaf == "weight":
            rows, columns = logical_shape(checkpoint, module, label)
            weight = torch.empty(rows, columns, dtype=dtype)
            for start, stop in _even_pieces(checkpoint, name, label):
                weight[start:stop] = dequantize(checkpoint, module, label, start, stop)
            weights[name] = weight
        elif leaf not in _NOT_LOADED:
            weights[name] = checkpoint.rows(name)
    return weights


def _even_pieces(checkpoint: Checkpoint, name: str, label: Label) -> list[tuple[int, int]]:
    factor = label.packed[0]
    return [(start * factor, stop * factor) for start, stop in checkpoint.pieces(name)]


def _round_inputs(module: Any, checkpoint: Checkpoint, layer: str, label: Label) -> None:
    scale = checkpoint.rows(f"{layer}.input_scale") if label.input_divisor is not None else None
    module.register_forward_pre_hook(lambda _module, args: (quantize_input(args[0], label, scale), *args[1:]))
