"""How many numbers a model keeps of the tokens that it has seen: keys and values, by its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.errors import Unsupported, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WINDOWED = ("sliding_attention", "chunked_attention")
_WITHOUT = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "moe", "mlp")
"""Layers that keep a state of fixed size, or nothing."""


def attention_layers(config: PreTrainedConfig) -> list[str]:
    """Kind of each layer that keeps keys and values of its own: ``full_attention`` or one with a window.

    Raises:
        Unsupported: A kind of layer is not known.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:
        window = isinstance(getattr(text, "sliding_window", None), int)
        kinds = ["sliding_attention" if window else "full_attention"] * int(text.num_hidden_layers)
    shared = getattr(text, "num_kv_shared_layers", None) or 0  # the last ones read what earlier ones keep
    layers = []
    for kind in list(kinds)[: len(kinds) - int(shared)]:
        if kind in ("full_attention", "attention", *_WINDOWED):
            layers.append("full_attention" if kind == "attention" else str(kind))
        elif kind not in _WITHOUT:
            raise Unsupported(f"layers of the kind {kind} are not known: how much they keep cannot be counted")
    return layers


def cached_numbers(config: PreTrainedConfig, context: int) -> int:
    """Keys and values of one request, all layers together.

    A latent attention keeps its latent vector and the rotated part of the key, as vLLM stores them. The state of
    layers without keys and values is not counted.

    Args:
        config: The ``transformers`` config of the model.
        context: Tokens of the request.

    Raises:
        Unsupported: A kind of layer is not known, or the config does not say how many heads there are.
        UserError: The context is longer than the model's.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < context:
        raise UserError(
            f"context={context} is longer than the {positions:,} positions of the model; use {positions} or less"
        )
    numbers, total = _per_token(text), 0
    for kind in attention_layers(config):
        window = getattr(text, "attention_chunk_size" if kind == "chunked_attention" else "sliding_window", None)
        kept = min(context, window) if kind in _WINDOWED and isinstance(window, int) else context
        total += kept * numbers
    return total


def _per_token(text: PreTrainedConfig) -> int:
    latent = getattr(text, "kv_lora_rank", None)
    if isinstance(latent, int) and latent > 0:
        return latent + int(getattr(text, "qk_rope_head_dim", 0) or 0)
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int) or not isinstance(heads, int):
        raise Unsupported("the config does not say how many heads of keys there are: the KV cache cannot be counted")
    width = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    return kv_heads * (int(width) + int(getattr(text, "v_head_dim", None) or width))
