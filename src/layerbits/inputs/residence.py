"""Where a module's weights are, for a model of which only some blocks are on the device (``offload``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn


Module = TypeVar("Module", bound="nn.Module")

MARK = "_layerbits_offload"
"""Attribute of a streamed module: what streams it, and the number of its block."""


OWN_DTYPE = "_layerbits_own_dtype"
"""Attribute of a module whose weights are in a wider dtype for a while: their own."""


def own_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights where they are in a wider one for a while, else ``None``."""
    return vars(module).get(OWN_DTYPE)


def resident(module: Module) -> Module:
    """Makes sure that the weights of a module are where it computes, until another block is asked for.

    Returns:
        The module.
    """
    place = vars(module).get(MARK)
    if place is not None:
        place[0].fetch(place[1])
    return module


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, its weights being there now or not."""
    place = vars(module).get(MARK)
    return next(module.parameters()).device if place is None else place[0].device
