"""An exported checkpoint against what was scored: weights, activation scales and everything that was left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerbits.checkpoint.dequantize import block_scales, check_parts, dequantize
from layerbits.checkpoint.experts import ExpertLinear
from layerbits.checkpoint.layouts.base import Scale
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.scored import ScoredLayer
from layerbits.errors import UserError
from layerbits.scoring import quantizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FP32_SLACK = 2.0**-21
"""Relative difference of a product with a scale and of a quotient by its reciprocal, in float32."""
ERROR_RATIO = 1.05
"""How much larger the error of a weight may become by the scale that it shares with others, in the Frobenius norm."""
SCALE_ROUNDING = 2.0**-9
"""What a scale in bfloat16 adds to the error of a weight, as a share of the weight, in the Frobenius norm.

A number rounded to bfloat16 is 2^-7 / sqrt(24) off on the root of the mean square, as its mantissa is uniform over 1 to
2, and 2^-8 at most. Beside the error of eight bits that shows where a weight was on their grid to begin with.
"""

_E4M3_NORMAL = 2.0**-6  # below it block scales have fewer digits, and a second rounding may move them by a step


@dataclass(frozen=True)
class LayerProof:
    """What comparing one linear found.

    Attributes:
        elements: Weights compared.
        identical: Weights that are, in the model's dtype, the fake-quantized ones at the stored scale.
        worst: Largest difference from those, as a share of what is allowed; at most 1.
        error_ratio: Error against the unquantized weight, relative to that at the scored scale; 1 unless it is shared.
        problem: What is wrong, empty where nothing is.
    """

    module: str
    candidate: str
    label: str
    elements: int
    identical: int
    worst: float
    error_ratio: float
    problem: str


@dataclass(frozen=True)
class ExcludedProof:
    """What comparing everything else found.

    Attributes:
        tensors: Tensors that are in source and export, bit for bit.
        bytes: Their size.
        cast: How many of them the export stores in another dtype: equal after that cast.
        tied: Tensors of the source that are another tensor's copy, left out as tied.
        unused: Tensors of the source that the model does not load and that are not carried.
        problems: What is wrong.
    """

    tensors: int
    bytes: int
    cast: int
    tied: tuple[str, ...]
    unused: tuple[str, ...]
    problems: tuple[str, ...]


def compare_layer(
    exported: Checkpoint, source: Checkpoint, quantization: Quantization, layer: ScoredLayer, device: str
) -> LayerProof:
    """Compares a stored weight with the scored one, some rows at a time; what cannot be read is a problem too.

    Args:
        exported: The export.
        source: The checkpoint that was scored.
        quantization: The export's configuration.
        layer: What was scored.
        device: Where the weights are quantized; kernels differ in rounding.
    """
    elements = source.entry(f"{layer.stored}.weight").elements
    exported_label = quantization.layers.get(layer.exported)
    if exported_label != layer.label:
        what = "is not labelled" if exported_label is None else f"is labelled {exported_label.algo}"
        return _failed(layer, elements, f"{layer.stored} {what}, scored was {layer.label.algo}")
    try:
        check_parts(exported, layer.exported, layer.label)
        return _compared(exported, source, layer, device)
    except UserError as error:
        return _failed(layer, elements, str(error))


def _compared(exported: Checkpoint, source: Checkpoint, layer: ScoredLayer, device: str) -> LayerProof:
    name, label = f"{layer.stored}.weight", layer.label
    elements = source.entry(name).elements
    rows = source.entry(name).shape[0]
    identical, worst, beyond = 0, 0.0, 0
    error, scored_error, size = 0.0, 0.0, 0.0
    elsewhere = not layer.as_scored
    for start, stop in source.pieces(name):
        weight = source.rows(name, start, stop).to(device, layer.dtype)
        expected = fake_quantized(layer, weight, layer.stored_range, rows, start, stop)
        stored = dequantize(exported, layer.exported, label, start, stop, device)
        difference = (stored - expected.float()).abs()
        allowed = _allowed(exported, layer, stored, start, stop)
        beyond += int((~(difference <= allowed)).sum())
        worst = max(worst, float(torch.where(difference > 0, difference / allowed, 0.0).max()))
        identical += int((stored.to(layer.dtype) == expected).sum())
        if elsewhere:
            scored = fake_quantized(layer, weight, layer.weight_range, rows, start, stop, factor=1.0)
            error += float((stored - weight.float()).double().square().sum())
            scored_error += float((scored.float() - weight.float()).double().square().sum())
            size += float(weight.double().square().sum())
    ratio = (error / scored_error) ** 0.5 if scored_error else 1.0
    if beyond:
        problem = f"{beyond} of {elements} weights of {layer.stored} are not the scored ones"
    elif not error_allowed(error, scored_error, size):
        problem = (
            f"{layer.stored} has {ratio:.3f} times the error of the scored weight, at most {ERROR_RATIO} is allowed"
        )
    else:
        problem = _scale_problem(exported, layer) or _input_problem(exported, layer)
    return LayerProof(layer.module, layer.candidate, label.algo, elements, identical, worst, ratio, problem)


def error_allowed(error: float, scored_error: float, size: float) -> bool:
    """Whether the error of a stored weight is that of the scored one, up to what its stored scale may add.

    Args:
        error: Sum of squares of the stored weight less the unquantized one.
        scored_error: The same of the scored weight.
        size: Sum of squares of the unquantized weight.
    """
    return error <= ERROR_RATIO**2 * scored_error or error - scored_error <= SCALE_ROUNDING**2 * size


def compare_excluded(
    exported: Checkpoint, source: Checkpoint, layers: Sequence[ScoredLayer], loaded: Mapping[str, str]
) -> ExcludedProof:
    """Compares every tensor that is not a quantized weight, bit for bit.

    Args:
        exported: The export.
        source: The checkpoint that was scored.
        layers: The quantized linears.
        loaded: Names in the checkpoint of all that the model loads → the name of the tensor that it is tied to, or
            itself.
    """
    quantized = {f"{layer.stored}.weight" for layer in layers}
    tensors, size, cast = 0, 0, 0
    tied, unused, problems = [], [], []
    for name, entry in source.entries.items():
        if name in quantized:
            continue
        if name not in exported:
            twin = loaded.get(name)
            if twin is None:
                unused.append(name)
            elif twin != name and twin in source and _equal(source, name, source, twin):
                tied.append(name)
            else:
                problems.append(f"{name} is not in the export")
            continue
        tensors += 1
        size += entry.stop - entry.start
        cast += entry.dtype != exported.entry(name).dtype
        if exported.entry(name).shape != entry.shape or not _equal(source, name, exported, name):
            problems.append(f"{name} is not the source's")
    made = {f"{layer.exported}.{part}" for layer in layers for part in (*layer.label.parts, "pre_quant_scale")}
    known = set(source.entries) | made
    problems += [
        f"{name} is in the export alone"
        for name in exported.entries
        if name not in known and not name.endswith((".k_scale", ".v_scale"))
    ]
    return ExcludedProof(tensors, size, cast, tuple(tied), tuple(unused), tuple(problems))


def kv_problems(exported: Checkpoint, ranges: Mapping[str, torch.Tensor]) -> list[str]:
    """Scales of the KV cache that are not what was calibrated.

    Args:
        exported: The export.
        ranges: Name of a scale in the checkpoint → calibrated range.
    """
    problems = [
        f"{n} was never calibrated"
        for n in exported.entries
        if n.endswith((".k_scale", ".v_scale")) and n not in ranges
    ]
    for name, amax in ranges.items():
        if name not in exported:
            problems.append(f"{name} is not in the export")
        elif not _close(exported.rows(name), amax.float().cpu().reshape(()) / 448.0):
            problems.append(f"{name} is not its calibrated range / 448")
    return problems


def fake_quantized(
    layer: ScoredLayer,
    weight: torch.Tensor,
    amax: torch.Tensor | None,
    rows: int,
    start: int,
    stop: int,
    factor: float | None = None,
) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of a weight after ModelOpt's fake quantization, in the model's dtype.

    Args:
        layer: Its settings.
        weight: Those rows, on the device whose kernels quantize: they differ in rounding.
        amax: Range of the whole weight, or of every row or block of it; ``None`` = the format needs none.
        rows: Rows of the whole weight.
        start: First row.
        stop: One past the last row.
        factor: What the kernel takes for the range, relative to it; by default what the label prescribes.
    """
    quantizer = quantizers.make_quantizer(layer.weight, weight.device)
    assert quantizer is not None
    if amax is not None:
        if amax.numel() > 1:  # a range per row or per block of a row
            amax = amax.reshape(rows, -1)[start:stop].reshape(-1, 1)
        quantizer.amax = amax.to(weight.device).float() * (layer.label.kernel_factor if factor is None else factor)
    with torch.no_grad():
        return quantizer(weight)


def _allowed(exported: Checkpoint, layer: ScoredLayer, stored: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """How far each stored weight may be from the fake-quantized one."""
    # That one was rounded to the model's dtype, which is less than half a step of any format.
    finfo = torch.finfo(layer.dtype)
    allowed = stored.abs() * (finfo.eps / 2 + FP32_SLACK) + finfo.smallest_normal * finfo.eps
    second = layer.label.layout.second
    if second is None:
        return allowed
    scale = block_scales(exported, layer.exported, layer.label, start, stop).to(stored.device)
    whole = float(second.factor(exported.rows(f"{layer.exported}.{second.part}")))
    coarse = (scale < 1.01 * _E4M3_NORMAL * whole).repeat_interleave(stored.shape[1] // scale.shape[1], 1)
    return torch.where(coarse, allowed + 2.0 * _E4M3_NORMAL * whole, allowed)


def _scale_problem(exported: Checkpoint, layer: ScoredLayer) -> str:
    """Scales have float32's precision: what the rounding to the model's dtype hides in the weights shows here."""
    scale = layer.label.layout.ranged
    if scale is None:
        return ""
    assert layer.scale_range is not None
    return _range_problem(exported, layer, scale, layer.scale_range)


def _input_problem(exported: Checkpoint, layer: ScoredLayer) -> str:
    scale = layer.label.input_scale
    if scale is None:
        return ""
    if layer.input_range is None:
        return f"the input of {layer.stored} was never calibrated"
    return _range_problem(exported, layer, scale, layer.input_range)


def _range_problem(exported: Checkpoint, layer: ScoredLayer, scale: Scale, amax: torch.Tensor) -> str:
    name = f"{layer.exported}.{scale.part}"
    stored = exported.rows(name).float()
    amax = amax.float().cpu().reshape(stored.shape)
    divisor = torch.full_like(amax, scale.divisor or 1.0)
    expected = divisor / amax if scale.inverse else amax / divisor
    slack = FP32_SLACK + (0.0 if scale.dtype == "float32" else scale.rounding)
    if _close(stored, torch.where(amax > 0, expected, stored), slack):  # where all weights are zero, any scale does
        return ""
    return (
        f"{name} is not {scale.divisor:g} / its calibrated range"
        if scale.inverse
        else (f"{name} is not its calibrated range / {scale.divisor:g}")
    )


def _equal(one: Checkpoint, name: str, other: Checkpoint, twin: str) -> bool:
    dtype = other.entry(twin).dtype
    for start, stop in one.pieces(name):
        a, b = one.rows(name, start, stop).to(dtype), other.rows(twin, start, stop)
        if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            return False
    return True


def _close(a: torch.Tensor, b: torch.Tensor, slack: float = FP32_SLACK) -> bool:
    return bool(((a.float() - b).abs() <= slack * b.abs()).all())


def _failed(layer: ScoredLayer, elements: int, problem: str) -> LayerProof:
    nan = float("nan")
    return LayerProof(layer.module, layer.candidate, layer.label.algo, elements, 0, nan, nan, problem)


def loaded_names(
    model: PreTrainedModel, on_disk: Mapping[str, str], experts: Sequence[ExpertLinear] = ()
) -> dict[str, str]:
    """Names in the checkpoint of all that a model loads → the name of what it is tied to, or itself.

    Args:
        model: As loaded.
        on_disk: From :func:`layerbits.inputs.names.names_on_disk`.
        experts: From :func:`layerbits.checkpoint.experts.expert_linears`.

    Raises:
        UserError: Tied parameters have no name in the checkpoint.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    try:
        own = {f"{expert.name}.weight": f"{expert.name}.weight" for expert in experts}
        return own | {stored: on_disk[ties.get(name, name)] for name, stored in on_disk.items()}
    except KeyError as error:
        raise UserError(f"{error} is tied to another parameter but not part of the model; untie it") from None
