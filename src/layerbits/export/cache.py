"""Whether the scales of an FP8 KV cache can be stored where a runtime looks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from layerbits.errors import Unsupported
from layerbits.inputs.language_model import find_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_OF = ("self_attn", "mixer")
"""Names of attentions whose scales vLLM reads (``get_cache_scale_mapper``); it passes over others without a word."""


def check_cache(model: PreTrainedModel) -> None:
    """Checks the attentions of the language model before anything heavy is loaded.

    Args:
        model: With numbers or without.

    Raises:
        Unsupported: One has a name that vLLM reads no scales of, keeps a latent vector instead of keys and values, or
            reads the cache of an earlier one.
    """
    prefix, language_model = find_language_model(model)
    for name, module in language_model.named_modules(prefix=prefix):
        if not type(module).__name__.endswith("Attention") or not any(
            isinstance(c, nn.Linear) for c in module.children()
        ):
            continue
        if (leaf := name.rpartition(".")[2]) not in READ_OF:
            why = f"vLLM reads such scales of {' and '.join(READ_OF)} alone, not of {leaf}"
        elif not any(hasattr(module, projection) for projection in ("k_proj", "qkv_proj")):
            why = "it has no keys and values of its own that a range could be of"
        else:
            continue
        raise Unsupported(f"no scales of an FP8 KV cache are written for {name}: {why}; use kv_cache=none")
