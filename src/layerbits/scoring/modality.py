"""Inputs at image positions beside those at words: what a static range that was found on text would clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from layerbits.inputs.calibration import Segment
from layerbits.inputs.linears import is_convolution, tokens_of
from layerbits.results.modality import ImageRange

if TYPE_CHECKING:
    from layerbits.scoring.search import Search
    from layerbits.scoring.tap import Tap

Seen = tuple[float, npt.NDArray[np.float32]]
"""Largest magnitude at words, and that of each token at an image position."""


class ImageInputs:
    """Largest magnitudes of inputs while activation ranges are found; sees nothing where no row has pictures.

    Nothing here waits for the device before :meth:`take`.

    Args:
        looking: Whether some row of the calibration has pictures, of this process or another.
    """

    def __init__(self, looking: bool = False) -> None:
        self._looking = looking
        self._tokens = 0
        self._mask: torch.Tensor
        self._places: torch.Tensor
        self._words: dict[str, torch.Tensor] = {}
        self._images: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def enter(self, segment: Segment) -> None:
        """Tells which rows the next inputs are of."""
        self._tokens, self._last = segment.input_ids.numel(), None
        self._mask = segment.image_tokens.flatten()
        self._places = self._mask.nonzero()[:, 0]

    def see(self, tap: Tap, site: str, x: torch.Tensor) -> None:
        """Takes an input of a module, where it has a range for every token of the rows."""
        if not self._looking or tokens_of(tap.module, x) != self._tokens:  # of experts: routed tokens
            return
        if not any(s == site for _, s, _, _ in tap.range_names()):
            return
        if self._mask.device != x.device:
            self._mask, self._places = self._mask.to(x.device), self._places.to(x.device)
        if self._last is None or self._last[0] is not x:  # linears that are fused share it
            largest = x.abs().amax(dim=1 if is_convolution(tap.module) else -1).flatten().float()
            self._last = x, largest.masked_fill(self._mask, 0).max(), largest[self._places]
        _, words, images = self._last
        name = f"{tap.name}.{site}" if site else tap.name
        self._words[name] = torch.maximum(self._words.get(name, words), words)
        self._images.setdefault(name, []).append(images)

    def take(self) -> dict[str, Seen]:
        """What was seen, by module; empty where no row had pictures."""
        return {n: (float(words), torch.cat(self._images[n]).cpu().numpy()) for n, words in self._words.items()}


def clipped(parts: Sequence[Mapping[str, Seen]]) -> dict[str, npt.NDArray[np.float64]]:
    """Puts together what several processes saw.

    Returns:
        Module → float64 ``[4]``: largest magnitude at words, at image positions, image tokens that have a larger one
        than any word, and image tokens.
    """
    counts = {}
    for name in {name for part in parts for name in part}:
        words = max(part[name][0] for part in parts if name in part)
        images = np.concatenate([part[name][1] for part in parts if name in part])
        largest = float(images.max()) if len(images) else 0.0
        counts[name] = np.array([words, largest, (images > words).sum(), len(images)], dtype=np.float64)
    return counts


def image_ranges(counts: Mapping[str, npt.NDArray[np.float64]], search: Search) -> tuple[ImageRange, ...]:
    """A record per module with a static input range, in the order of the search."""
    made = []
    for at, name in zip(search.group_of, search.names, strict=True):
        for key in (name, *(key for key in counts if key.startswith(f"{name}."))):
            if key in counts and counts[key][3]:
                words, images, over, tokens = counts[key].tolist()
                group = search.groups[int(at)]
                made.append(ImageRange(group.key, group.block, key, words, images, over / tokens))
    return tuple(made)
