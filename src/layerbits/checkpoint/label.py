"""What an export says of a linear: the name, what it means and how the weight is stored.

A label is all that a runtime learns about a weight. :mod:`layerbits.checkpoint.labels` finds the one that says what a
candidate is.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerbits.checkpoint.layouts.base import Layout, Scale

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
FORMATS = (MODELOPT, COMPRESSED)
AUTO = "auto"

INPUT_FP8, INPUT_FP8_TOKEN, INPUT_INT8, INPUT_INT8_TOKEN = "fp8", "fp8_token", "int8", "int8_token"
INPUT_NVFP4, INPUT_MXFP4, INPUT_MXFP8 = "nvfp4", "mxfp4", "mxfp8"
NVFP4_DIVISOR = 6.0 * 448.0
"""The largest E2M1 value times the largest E4M3 scale: what ModelOpt's NVFP4 kernel divides the range by."""


@dataclass(frozen=True)
class Label:
    """What an export says of a linear: what it means and how it is stored.

    Attributes:
        format: One of :data:`FORMATS`.
        algo: ``quant_algo`` of ModelOpt, or the name that we give to a scheme of compressed-tensors.
        weights: What the weights are, in the words of :func:`layerbits.candidates.description.describe`.
        inputs: What the activations are, ``-`` = untouched.
        layout: How the weight is stored.
        arithmetic: What happens to the activations, one of the ``INPUT_*``; ``None`` = nothing.
        input_scale: The scale of a calibrated activation range; ``None`` = none is stored.
        one_scale: Whether runtimes have one ranged scale for the linears that they fuse.
    """

    format: str
    algo: str
    weights: str
    inputs: str
    layout: Layout
    arithmetic: str | None = None
    input_scale: Scale | None = None
    one_scale: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that a linear is stored in, apart from its bias."""
        scales = (self.layout.scale, self.layout.second, self.input_scale)
        more = ("weight_shape",) if self.layout.with_shape else ()
        return (self.layout.tensor, *(scale.part for scale in scales if scale is not None), *more)

    @property
    def kernel_factor(self) -> float:
        """What ModelOpt's NVFP4 kernel takes for the range, relative to it, to compute with the stored second scale."""
        second = self.layout.second
        return NVFP4_DIVISOR / second.divisor if second is not None and second.divisor else 1.0


def meaning(weights: str, inputs: str) -> str:
    """What a label means, in words."""
    return f"{weights} x {'activations untouched' if inputs == '-' else inputs}"
