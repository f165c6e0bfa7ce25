"""The decoder blocks of a language model: the elements of the lists that hold its linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from layerbits.inputs.models import language_model_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def block_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules with linears inside, by name, in model order.

    A list of bare linears is none of blocks (Gemma 3n).

    Args:
        model: A causal language model, which may be on the meta device.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name in language_model_linears(model):
        parts = name.split(".")
        for end in range(1, len(parts) - 1):
            module = model.get_submodule(prefix := ".".join(parts[:end]))
            if isinstance(module, nn.ModuleList):
                lists[prefix] = module
                break
    return lists


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """All blocks, in model order."""
    return [block for blocks in block_lists(model).values() for block in blocks]
