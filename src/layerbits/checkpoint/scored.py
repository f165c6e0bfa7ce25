"""The quantized linears of a scheme as they were scored, and the ranges that their export stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from layerbits.checkpoint.experts import ExpertLinear, expert_linears
from layerbits.checkpoint.label import COMPRESSED, Label
from layerbits.probing.apply import configs_of
from layerbits.scoring.assigned import calibrated
from layerbits.scoring.experts import ExpertsTap
from layerbits.scoring.tap import LinearTap

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from transformers import PreTrainedModel

    from layerbits.probing.apply import Ranges
    from layerbits.results.result import CandidateInfo
    from layerbits.schemes import Scheme


@dataclass(frozen=True)
class ScoredLayer:
    """A quantized linear as it was scored.

    Attributes:
        module: Name in memory. stored: Name in the source. exported: Name in the export.
        candidate: Name of its candidate.
        label: What the export has to label it.
        dtype: Dtype of the model's weights.
        weight, inputs: ModelOpt settings of its quantizers; ``None`` = disabled.
        weight_range: Calibrated range of the weight, ``None`` where there is none.
        scale_range: The range that its stored scale is made of: that, or the largest of the fused linears'.
        stored_range: The range that the stored scale stands for: that, rounded with the scale.
        input_range: Calibrated range of the input, ``None`` where there is none.
        expert: Where its rows are in memory, for a linear of an expert.
    """

    module: str
    stored: str
    exported: str
    candidate: str
    label: Label
    dtype: torch.dtype
    weight: QuantizerAttributeConfig | None
    inputs: QuantizerAttributeConfig | None
    weight_range: torch.Tensor | None
    scale_range: torch.Tensor | None
    stored_range: torch.Tensor | None
    input_range: torch.Tensor | None
    expert: ExpertLinear | None = None

    @property
    def as_scored(self) -> bool:
        """Whether the weights are quantized at exactly the range that was scored."""
        if self.weight_range is None or self.stored_range is None:
            return self.weight_range is None
        return bool(torch.equal(self.weight_range.float(), self.stored_range.float()))


def scored_layers(
    model: PreTrainedModel, scheme: Scheme, labels: Mapping[str, Label], ranges: Ranges, on_disk: Mapping[str, str]
) -> list[ScoredLayer]:
    """The quantized linears of a scheme with their calibrated settings.

    Args:
        model: As loaded.
        scheme: What is exported.
        labels: Candidate name → its label.
        ranges: Static activation ranges.
        on_disk: From :func:`layerbits.inputs.names.names_on_disk`.
    """
    layers = []
    experts = expert_linears(model)
    taps = calibrated(model, configs_of(model, scheme), ranges.inputs)
    for name, info in scheme.modules.items():
        tap, label = taps[name], labels[info.name]
        if isinstance(tap, ExpertsTap):
            layers += [_expert_layer(tap, expert, info, label) for expert in experts if expert.module == name]
            continue
        stored = on_disk[f"{name}.weight"].removesuffix(".weight")
        assert isinstance(tap, LinearTap)
        (weight,), (inputs,) = tap.weight_quantizers(), tap.inputs[""]
        layers.append(
            ScoredLayer(
                module=name,
                stored=stored,
                # transformers 5.14 renames packed tensors of older names wrongly when it loads them.
                exported=name if label.format == COMPRESSED else stored,
                candidate=info.name,
                label=label,
                dtype=tap.module.weight.dtype,
                weight=tap.setting[0],
                inputs=tap.setting[1],
                weight_range=_range(weight),
                scale_range=_range(weight),
                stored_range=None,
                input_range=_range(inputs),
            )
        )
    return [_with_stored_range(layer) for layer in _with_shared_ranges(layers, scheme)]


def _expert_layer(tap: ExpertsTap, expert: ExpertLinear, info: CandidateInfo, label: Label) -> ScoredLayer:
    weight, inputs = tap.setting
    amax = tap.weight_range(expert.projection, expert.expert, expert.start, expert.stop)
    return ScoredLayer(
        module=f"{expert.module}.{expert.expert}.{expert.name.rpartition('.')[2]}",
        stored=expert.name,
        exported=expert.name,
        candidate=info.name,
        label=label,
        dtype=getattr(tap.module, expert.projection).dtype,
        weight=weight,
        inputs=inputs,
        weight_range=amax,
        scale_range=amax,
        stored_range=None,
        input_range=_range(tap.inputs[expert.projection][0]),
        expert=expert,
    )


def _with_shared_ranges(layers: Sequence[ScoredLayer], scheme: Scheme) -> list[ScoredLayer]:
    """Linears of one group with the largest of their ranges, where runtimes have one scale for all of them."""
    group = {module: g.key for g in scheme.groups for module in g.modules}
    shared: dict[str, torch.Tensor] = {}
    for layer in layers:
        # One range for gate and up is what experts are scored with.
        if layer.label.one_scale and layer.weight_range is not None and layer.expert is None:
            key = group[layer.module]
            shared[key] = max(shared.get(key, layer.weight_range), layer.weight_range)
    return [
        replace(layer, scale_range=shared[group[layer.module]])
        if layer.label.one_scale and layer.expert is None
        else layer
        for layer in layers
    ]


def _with_stored_range(layer: ScoredLayer) -> ScoredLayer:
    scale = layer.label.layout.ranged
    if scale is None or layer.scale_range is None:
        return layer
    if scale.dtype == "float32":  # stored to a rounding of one operation: what was scored, for all that is compared
        return replace(layer, stored_range=layer.scale_range)
    return replace(layer, stored_range=scale.range(scale.stored(layer.scale_range)))


def _range(quantizer: TensorQuantizer | None) -> torch.Tensor | None:
    amax = None if quantizer is None else quantizer.amax
    return None if amax is None else amax.detach().clone()
