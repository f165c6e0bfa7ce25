"""Where a model's weights go, decided before they are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError
from layerbits.inputs.loading import empty_model
from layerbits.inputs.offload import parts_of
from layerbits.scoring.memory import HEADROOM, Needs, free_bytes, free_host_bytes
from layerbits.scoring.quantizers import UNQUANTIZED, QuantizerSettings
from layerbits.scoring.taps import Taps

if TYPE_CHECKING:
    from layerbits.inputs.models import ResolvedModel


def in_host_memory(
    resolved: ResolvedModel,
    scored: Sequence[str],
    tokens: int,
    device: str,
    wanted: str,
    settings: QuantizerSettings = UNQUANTIZED,
    patches: int = 0,
) -> bool:
    """Whether a model must be loaded with its weights in host memory.

    Args:
        resolved: The model.
        scored: Names of the scored modules.
        tokens: Tokens of the largest segment.
        device: ``cpu``, ``cuda`` or ``cuda:<n>``.
        wanted: A memory mode; ``auto`` says yes where ``lean`` does not fit the GPU.
        settings: Distinct quantizer settings of the candidates.
        patches: Of the pictures of the segment that has most.

    Raises:
        UserError: ``offload`` is wanted and host memory is too small for it.
        Unsupported: ``offload`` is wanted and the model has no single list of blocks.
    """
    if wanted not in ("auto", "offload") or (wanted == "auto" and (device == "cpu" or resolved.spec.device_map)):
        return False
    needs = needs_of(resolved, scored, tokens, settings, patches)
    if wanted == "auto":
        if needs.device_bytes("lean") <= HEADROOM * free_bytes(torch.device(device)) or not needs.model.block:
            return False
    else:
        parts_of(empty_model(resolved))  # says why it cannot be streamed
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process of a host holds all of the weights
    wants, free = here * needs.host_bytes / 1e9, free_host_bytes() / 1e9
    if wants <= free:
        return True
    if wanted == "auto":
        return False  # lean may still fit: this is an estimate
    each = f" ({here} processes)" if here > 1 else ""
    raise UserError(
        f"memory=offload needs {wants:.1f} GB of host memory{each} and {free:.1f} GB are free; free some, use a "
        "machine with more, or spread the model over GPUs with model.device_map=auto"
    )


def needs_of(
    resolved: ResolvedModel,
    scored: Sequence[str],
    tokens: int,
    settings: QuantizerSettings = UNQUANTIZED,
    patches: int = 0,
) -> Needs:
    """What a pass will take, from the shapes of the model alone; arguments as of :func:`in_host_memory`."""
    model = empty_model(resolved)
    # quantizers say nothing of memory, and some cannot be made where there are no weights
    footprints = Taps(model, scored, UNQUANTIZED).footprints(tokens, patches)
    return Needs.of(model, footprints, tokens, len(settings.weights))
