"""What an export calls a candidate, what the name means, and which candidates no name is right for.

A label is all that a runtime learns about a weight. :mod:`layerbits.checkpoint.modelopt` has those of ModelOpt's
exports, :mod:`layerbits.checkpoint.compressed` those of compressed-tensors; a candidate that neither can say is refused
by name. :mod:`layerbits.checkpoint.table` writes all of them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerbits.candidates.formats import algorithm_settings, normalise
from layerbits.candidates.fused import shares_range
from layerbits.candidates.linear import FP4, INPUT, WEIGHT, block_lengths, read_config
from layerbits.candidates.table import SHARED, describe
from layerbits.checkpoint.layouts.base import Layout, Scale
from layerbits.errors import Unsupported
from layerbits.results.result import CandidateInfo

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
FORMATS = (MODELOPT, COMPRESSED)
AUTO = "auto"

INPUT_FP8, INPUT_FP8_TOKEN, INPUT_INT8, INPUT_INT8_TOKEN = "fp8", "fp8_token", "int8", "int8_token"
INPUT_NVFP4, INPUT_MXFP4, INPUT_MXFP8 = "nvfp4", "mxfp4", "mxfp8"
STAYS = "it stays available as fake quantization"
NVFP4_DIVISOR = 6.0 * 448.0
"""The largest E2M1 value times the largest E4M3 scale: what ModelOpt's NVFP4 kernel divides the range by."""

_GRANULARITY = {"num_bits", "axis", "block_sizes", "type", "effective_bits"}
_METHODS = {"max_calibrate", "_no_calibrate"}


@dataclass(frozen=True)
class Label:
    """What an export says of a linear: what it means and how it is stored.

    Attributes:
        format: One of :data:`FORMATS`.
        algo: ``quant_algo`` of ModelOpt, or the name that we give to a scheme of compressed-tensors.
        weights: What the weights are, in the words of :func:`layerbits.candidates.table.describe`.
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


def label_of(info: CandidateInfo, format: str) -> Label:
    """The label of one format that says what a candidate is.

    Raises:
        Unsupported: None does; the candidate stays available as fake quantization.
    """
    label, why = label_or_reason(info, format)
    if label is None:
        raise Unsupported(f"{info.name} cannot be exported as {format}: {why}; {STAYS}")
    return label


def label_or_reason(info: CandidateInfo, format: str) -> tuple[Label | None, str]:
    """The label of one format that says what a candidate is, or ``None`` and why none does."""
    from layerbits.checkpoint import compressed, modelopt

    config = normalise(info.config)
    cfgs = read_config(config).cfgs
    if why := _beyond_labels(config, cfgs):
        return None, why
    # Who shares a range says where a scale comes from, not what a runtime does with it.
    weights, inputs = describe(cfgs[WEIGHT]).removesuffix(SHARED), describe(cfgs[INPUT])
    known = compressed if format == COMPRESSED else modelopt
    label = known.find(weights, inputs)
    return label, "" if label is not None else known.why_not(info, weights, inputs)


def check_shape(info: CandidateInfo, label: Label, module: str, rows: int, columns: int) -> None:
    """Checks that a weight fits the layout of a label.

    Raises:
        Unsupported: Its blocks would be cut.
    """
    layout = label.layout
    whole = layout.block or layout.packed[1]
    if columns % whole:
        raise Unsupported(
            f"{module} has {columns} columns, not a multiple of {whole}: {label.algo} stores whole blocks only; "
            f"leave it unquantized, or use another candidate than {info.name}"
        )
    if rows % layout.packed[0]:
        raise Unsupported(f"{module} has {rows} rows, {label.algo} packs two in one; leave it unquantized")


def meaning(weights: str, inputs: str) -> str:
    """What a label means, in words."""
    return f"{weights} x {'activations untouched' if inputs == '-' else inputs}"


def _beyond_labels(config: Mapping[str, Any], cfgs: Mapping[str, Any]) -> str | None:
    """What a configuration asks for that no label could express."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    methods = [name for name, _ in algorithm_settings(config["algorithm"])]
    if not set(methods) <= _METHODS:
        return f"it is calibrated by {', '.join(methods)}, only max is proven"
    for quantizer, cfg in cfgs.items():
        if isinstance(cfg, list):
            return f"its {quantizer} has {len(cfg)} stages"
        if cfg is None:
            continue
        known = {"backend", "backend_extra_args"} if shares_range(cfg) else {"backend"}
        settings = QuantizerAttributeConfig(**{k: v for k, v in cfg.items() if k not in known})
        if unknown := sorted(set(settings.model_dump(exclude_defaults=True)) - _GRANULARITY):
            return f"its {quantizer} sets {', '.join(unknown)}, which no label expresses"
        blocks = cfg.get("block_sizes") or {}
        if cfg.get("num_bits") == FP4 and block_lengths(cfg) and blocks.get("type") != "dynamic":
            return f"the block scales of its {quantizer} are static, only dynamic ones are proven"
    return None
