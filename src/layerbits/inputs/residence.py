"""Where a module's weights are, for a model of which only some blocks are on the device (``offload``)."""

from __future__ import annotations

from typing import Any

MARK = "_layerbits_offload"
"""Attribute of a streamed module: what streams it, and the number of its block."""


def resident(module: Any) -> Any:
    """Makes sure that the weights of a module are where it computes, until another block is asked for.

    Returns:
        The module.
    """
    place = vars(module).get(MARK)
    if place is not None:
        place[0].fetch(place[1])
    return module


def device_of(module: Any) -> Any:
    """Where a module computes, its weights being there now or not."""
    place = vars(module).get(MARK)
    return next(module.parameters()).device if place is None else place[0].device
