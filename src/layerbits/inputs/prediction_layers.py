"""Layers for multi-token prediction, which files have and ``transformers`` does not load.

They predict a token further ahead and serve speculative decoding. Files keep them under a module of their own
(``mtp.…``: Qwen3-Next, Nemotron-H, ERNIE) or as layers behind the last one of the model (DeepSeek-V3, GLM-4.5), as
many as ``num_nextn_predict_layers`` says. They take no part in what the model predicts next, so they are not scored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def prediction_module(tensor: str, config: PreTrainedConfig) -> str | None:
    """Name of the outermost module for multi-token prediction that a tensor is part of, ``None`` where it is of none.

    Args:
        tensor: Its name in the files.
        config: The ``transformers`` config of the model.
    """
    parts = tensor.split(".")
    text = config.get_text_config()
    depth, ahead = getattr(text, "num_hidden_layers", None), getattr(text, "num_nextn_predict_layers", None)
    behind = range(depth, depth + ahead) if isinstance(depth, int) and isinstance(ahead, int) else range(0)
    for at, part in enumerate(parts[:-1]):
        if part.startswith("mtp"):
            return ".".join(parts[: at + 1])
        if part.isdigit() and parts[at - 1] == "layers" and int(part) in behind:
            return ".".join(parts[: at + 1])
    return None


def prediction_modules(tensors: Iterable[str], config: PreTrainedConfig) -> list[str]:
    """The modules for multi-token prediction among some tensors, each once, in their order."""
    modules = (prediction_module(tensor, config) for tensor in tensors)
    return list(dict.fromkeys(name for name in modules if name is not None))
