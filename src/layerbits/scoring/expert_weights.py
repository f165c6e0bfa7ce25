"""The weight quantizers of all experts of a projection as one: a call quantizes ``[experts, out, in]``.

ModelOpt gives every expert a ``TensorQuantizer`` of its own and calls them one after the other. A scale per tensor of
an expert is a scale per slice of the whole projection, so that ModelOpt's quantizer with another ``axis`` computes the
same numbers for all experts at once; blocks and rows do not know experts at all. What is left (NVFP4 with stored block
ranges, ranges that are searched) is quantized expert by expert.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from layerbits.candidates import fp4
from layerbits.candidates.linear import FP8
from layerbits.errors import Unsupported, UserError
from layerbits.scoring import quantizers
from layerbits.scoring.fake_quant import has_kernel

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from triton.runtime import JITFunction

AT_ONCE = 1 << 27
"""Weights that are quantized at once: 512 MB in float32, which some kernels work in."""
_NARROW_AT_ONCE = 1 << 30
"""The same where a kernel reads and writes the model's dtype and nothing else; some count in 32 bits."""


class ExpertWeights:
    """A weight setting for the experts of one projection.

    Args:
        attributes: ModelOpt's quantizer attributes for the weight of one expert.
        weight: ``[experts, out_features, in_features]``.
        search: How the ranges are searched (``mse``), ``None`` = largest magnitudes.

    Attributes:
        dtype: What it computes in; weights in another are converted there and back.
    """

    def __init__(
        self, attributes: QuantizerAttributeConfig, weight: torch.Tensor, search: quantizers.Options | None = None
    ) -> None:
        experts, rows, width = weight.shape
        self._layout, adapted = ("each", attributes) if search is not None else _layout(attributes)
        self._search = search
        most = _NARROW_AT_ONCE if _narrow(attributes, self._layout, weight) else AT_ONCE
        size = 1 if self._layout == "each" else max(1, most // (rows * width))
        self._parts = [slice(at, min(at + size, experts)) for at in range(0, experts, size)]
        self._own = self._layout == "nvfp4" and (attributes.backend == fp4.NVFP4_BACKEND or weight.is_cuda)
        self._quantizers = [quantizers.make_quantizer(adapted, weight.device) for _ in self._parts]
        self._rows = rows
        self._amax: torch.Tensor
        self.dtype = weight.dtype

    def calibrate(self, weight: torch.Tensor, rows_amax: torch.Tensor) -> None:
        """Finds the ranges as ModelOpt's ``max`` calibration does.

        Args:
            weight: The weights.
            rows_amax: Largest magnitude of each row, ``[experts, out_features]``.
        """
        weight, rows_amax = weight.to(self.dtype), rows_amax.to(self.dtype)
        self._amax = rows_amax.amax(dim=1)
        for part, quantizer in zip(self._parts, self._quantizers, strict=True):
            if self._layout == "nvfp4" or not quantizers.needs_range(quantizer):
                continue
            if self._layout == "matrix":
                quantizer.amax = self._amax[part, None]
            elif self._layout == "row":
                quantizer.amax = rows_amax[part].reshape(-1, 1)
            else:
                quantizers.calibrate_weight(quantizer, self._seen(weight[part]), self._search)

    def range_of(self, expert: int, start: int, stop: int) -> torch.Tensor | None:
        """Range of some rows of one expert: of the expert, of each row, or of each block of a row, ``[-1, 1]``.

        Raises:
            Unsupported: The ranges lie along another dimension.
        """
        if self._layout in ("nvfp4", "matrix"):
            return self._amax[expert].clone()
        part = next(i for i, p in enumerate(self._parts) if p.start <= expert < p.stop)
        quantizer = self._quantizers[part]
        if not quantizers.needs_range(quantizer):
            return None
        if self._layout not in ("row", "row blocks"):
            raise Unsupported("a range per input channel of experts is not exported; use one per tensor, row or group")
        count = self._parts[part].stop - self._parts[part].start
        by_row = quantizer.amax.reshape(count, self._rows, -1)
        return by_row[expert - self._parts[part].start, start:stop].reshape(-1, 1).clone()

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized weights, a new tensor."""
        if weight.dtype != self.dtype:
            return self(weight.to(self.dtype)).to(weight.dtype)
        if len(self._parts) == 1:
            return self._quantized(0, weight).view(weight.shape)
        made = torch.empty_like(weight)
        for index, part in enumerate(self._parts):
            made[part] = self._quantized(index, weight[part]).view(made[part].shape)
        return made

    def _quantized(self, index: int, weight: torch.Tensor) -> torch.Tensor:
        if not self._own:
            return self._quantizers[index](self._seen(weight))
        amax = self._amax[self._parts[index]]
        return _nvfp4_on_gpu(weight, amax) if weight.is_cuda else fp4.nvfp4_each(weight, amax)

    def _seen(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights in the shape that the quantizer gets."""
        if self._layout == "each":
            return weight[0]
        if self._layout == "matrix":
            return weight.reshape(len(weight), -1)
        if self._layout in ("row", "row blocks"):
            return weight.reshape(-1, weight.shape[-1])
        return weight


def largest_by_row(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of each expert's weight, ``[experts, out_features]``.

    Raises:
        UserError: A weight is not finite.
    """
    from modelopt.torch.quantization.utils import reduce_amax

    amax = reduce_amax(weight, axis=2, squeeze_scalar=False)[..., 0]
    if not bool(torch.isfinite(amax).all()):
        raise UserError(f"the weight of {name} is not finite; the checkpoint is damaged, fetch it again")
    return amax


def _layout(attributes: QuantizerAttributeConfig) -> tuple[str, QuantizerAttributeConfig]:
    """How the scales lie in ``[experts, out, in]``, and the attributes that make ModelOpt's quantizer see it so."""
    blocks = dict(attributes.block_sizes or {})
    lengths = {k % 2: v for k, v in blocks.items() if isinstance(k, int)}
    whole = {k for k, v in lengths.items() if v is None}
    if lengths and len(whole) < len(lengths):
        if tuple(blocks.get("scale_bits") or ()) == (4, 3) and attributes.num_bits == (2, 1):
            if blocks.get("type") != "dynamic":
                return "each", attributes
            return "nvfp4", attributes
        return ("row blocks" if set(lengths) == {1} else "blocks"), attributes
    if lengths:  # whole dimensions share a scale: the others are what ModelOpt calls the axis
        own = {0, 1} - whole
    else:
        axis = attributes.axis
        own = {a % 2 for a in ([axis] if isinstance(axis, int) else axis or ())}
    layout, axis = {
        frozenset(): ("matrix", 0),
        frozenset({0}): ("row", 0),
        frozenset({1}): ("column", (0, 2)),
        frozenset({0, 1}): ("element", (0, 1, 2)),
    }[frozenset(own)]
    if layout == "column" and attributes.num_bits == FP8:
        return "each", attributes  # with ranges of three dimensions ModelOpt leaves its kernel, a last bit away
    return layout, attributes.model_copy(update={"axis": axis, "block_sizes": None})


def _narrow(attributes: QuantizerAttributeConfig, layout: str, weight: torch.Tensor) -> bool:
    """Whether quantizing takes no more memory than its result: no plain PyTorch in float32 on the way."""
    if not weight.is_cuda or layout not in ("matrix", "row", "row blocks", "nvfp4"):
        return False
    dynamic = (attributes.block_sizes or {}).get("type") == "dynamic"
    return has_kernel(attributes) or (attributes.backend is None and dynamic)


def _nvfp4_on_gpu(weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    import triton

    experts, rows, width = weight.shape
    weight = weight.contiguous()
    made = torch.empty_like(weight)
    scales = amax.float() / (6.0 * 448.0)
    blocks = 8
    grid = (experts, triton.cdiv(rows, 16), triton.cdiv(width, 16 * blocks))
    with torch.cuda.device(weight.device):
        _kernel()[grid](weight, made, scales, rows, width, ROWS=16, BLOCKS=blocks)
    return made


@cache
def _kernel() -> JITFunction:
    import triton

    from layerbits.scoring import nvfp4_kernel

    return triton.jit(nvfp4_kernel.quantize_each)
