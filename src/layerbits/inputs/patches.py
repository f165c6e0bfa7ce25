"""How many patches a vision tower makes of the pictures of some rows: what its linears see instead of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from layerbits.inputs.calibration import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def most_patches(segments: Iterable[Segment], config: PreTrainedConfig) -> int:
    """Patches of the segment that has most, by its pixels; 0 without pictures, or where the config has no patch size.

    A tower that takes whole pictures may see one token more of each, which is counted whether it does or not.

    Args:
        segments: Rows; those with pictures hold ``pixel_values``.
        config: The model's, whose ``vision_config`` says how large a patch is.
    """
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    if size is None:
        return 0
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = next((n for key in ("num_channels", "in_channels") if (n := getattr(vision, key, None))), 3)
    numbers = int(height) * int(width) * int(channels) * int(getattr(vision, "temporal_patch_size", 1) or 1)
    return max((_seen(segment, numbers) for segment in segments), default=0)


def _seen(segment: Segment, numbers: int) -> int:
    found = 0
    for row in segment.pictures:
        pixels = row.inputs.get("pixel_values")
        if pixels is not None:
            whole = pixels.shape[0] if pixels.dim() > 2 else 0  # pictures, which may have a token for their class
            found += pixels.numel() // numbers + whole
    return found
