"""What a checkpoint's configuration says of its linears, whichever format it is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from layerbits.checkpoint.label import COMPRESSED, Label


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantization configuration.

    Attributes:
        format: ``modelopt`` or ``compressed-tensors``.
        layers: Quantized module, named as in the checkpoint → label.
        exclude: Patterns of modules that stay as they are; few where every quantized one is listed instead.
        kv_cache: ``FP8`` or ``None``.
        mixed: Whether every layer is listed with its own label.
    """

    format: str
    layers: Mapping[str, Label]
    exclude: tuple[str, ...]
    kv_cache: str | None
    mixed: bool

    @property
    def rounds_activations(self) -> bool:
        """Whether some linear's inputs are quantized."""
        return any(label.arithmetic is not None for label in self.layers.values())

    @property
    def weights_only(self) -> Quantization:
        """The same weights, with the inputs of every linear left as they are."""
        return replace(self, layers={name: replace(label, arithmetic=None) for name, label in self.layers.items()})

    def matches(self, name: str, pattern: str) -> bool:
        """Whether a pattern of :attr:`exclude` names a module."""
        if self.format == COMPRESSED:
            if pattern.startswith("re:"):
                return re.match(pattern.removeprefix("re:"), name) is not None
            return pattern == name
        return fnmatchcase(name, pattern)
