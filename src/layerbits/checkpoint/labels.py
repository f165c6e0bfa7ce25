"""Which label ModelOpt writes for a candidate, what the label means, and which candidates it would misname.

A label (``quant_algo``) is all that a runtime learns about a weight. ModelOpt 0.47 derives it from the weight quantizer
almost alone, so for some candidates it names other activations, or another granularity, than what was scored. Those
are refused by name. :mod:`layerbits.checkpoint.table` writes all of them down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerbits.candidates.formats import algorithm_settings, normalise
from layerbits.candidates.linear import FP4, INPUT, WEIGHT, block_lengths, read_config
from layerbits.candidates.table import describe
from layerbits.errors import Unsupported, UserError
from layerbits.results.result import CandidateInfo

if TYPE_CHECKING:
    import torch

INPUT_FP8, INPUT_FP8_TOKEN, INPUT_INT8, INPUT_NVFP4 = "fp8", "fp8_token", "int8", "nvfp4"
_GRANULARITY = {"num_bits", "axis", "block_sizes", "type", "effective_bits"}
_METHODS = {"max_calibrate", "_no_calibrate"}
_GROUP = "INT4 per group of "


@dataclass(frozen=True)
class Label:
    """A ``quant_algo`` of ModelOpt 0.47: what it means and how it is stored.

    Attributes:
        algo: As in ``hf_quant_config.json``.
        weights: What the weights are, in the words of :func:`layerbits.candidates.table.describe`.
        inputs: What the activations are, ``-`` = untouched.
        stored: Dtype of the stored weight, as torch names it.
        packed: Rows and columns in one stored element.
        block: Columns that share a scale; 0 = one scale per row, ``None`` = one for all.
        scale: Dtype of ``weight_scale``.
        divisor: Range of the weight, of its row or of its block / ``weight_scale``; ``None`` = another rule.
        second_divisor: Range of the weight / ``weight_scale_2``, which multiplies the block scales; ``None`` = there is
            none. The range is the largest of the linears that runtimes fuse.
        input_divisor: Calibrated range / ``input_scale``; ``None`` = none is stored.
        arithmetic: What happens to the activations, one of the ``INPUT_*``; ``None`` = nothing.
    """

    algo: str
    weights: str
    inputs: str
    stored: str
    packed: tuple[int, int] = (1, 1)
    block: int | None = None
    scale: str = "float32"
    divisor: float | None = None
    second_divisor: float | None = None
    input_divisor: float | None = None
    arithmetic: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weight."""
        return _dtype(self.stored)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of ``weight_scale``."""
        return _dtype(self.scale)

    @property
    def kernel_factor(self) -> float:
        """What ModelOpt's NVFP4 kernel takes for the range, relative to it, to compute with ``weight_scale_2``."""
        return _NVFP4_DIVISOR / self.second_divisor if self.second_divisor else 1.0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of ``weight_scale``."""
        if self.block is None:
            return ()
        return (rows, columns // self.block) if self.block else (rows,)


_NVFP4_DIVISOR = 6.0 * 448.0  # the largest E2M1 value times the largest E4M3 scale
_NVFP4: dict[str, Any] = {"stored": "uint8", "packed": (1, 2), "block": 16, "scale": "float8_e4m3fn"}
_FP8_INPUT: dict[str, Any] = {"inputs": "FP8 per tensor", "input_divisor": 448.0, "arithmetic": INPUT_FP8}

LABELS = {
    label.algo: label
    for label in (
        Label("FP8", "FP8 per tensor", stored="float8_e4m3fn", divisor=448.0, **_FP8_INPUT),
        Label(
            "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8 per output channel",
            "FP8 per token, dynamic",
            "float8_e4m3fn",
            block=0,
            divisor=448.0,
            arithmetic=INPUT_FP8_TOKEN,
        ),
        Label("W8A16", "INT8 per output channel", "-", "int8", block=0, divisor=127.0),
        Label(
            "W8A8_SQ_PER_CHANNEL",
            "INT8 per output channel",
            "INT8 per tensor",
            "int8",
            block=0,
            divisor=127.0,
            input_divisor=127.0,
            arithmetic=INPUT_INT8,
        ),
        Label("W4A16_AWQ", _GROUP + "128", "-", "uint8", packed=(2, 1), block=128, divisor=7.0),
        Label("W4A16_NVFP4", "NVFP4 per 16", "-", second_divisor=_NVFP4_DIVISOR, **_NVFP4),
        Label(
            "NVFP4",
            "NVFP4 per 16",
            "NVFP4 per 16",
            second_divisor=_NVFP4_DIVISOR,
            input_divisor=_NVFP4_DIVISOR,
            arithmetic=INPUT_NVFP4,
            **_NVFP4,
        ),
        # Runtimes multiply the FP4 values into FP8, so the block scales stay below 448 / 6.
        Label("W4A8_NVFP4_FP8", "NVFP4 per 16", second_divisor=448.0, **_FP8_INPUT, **_NVFP4),
        Label("W4A8_MXFP4_FP8", "MXFP4 per 32", stored="uint8", packed=(1, 2), block=32, scale="uint8", **_FP8_INPUT),
    )
}
"""Labels that are understood, by ``quant_algo``; that of INT4 for groups of 128, see :func:`label_of_layer`."""


def label_of_layer(layer: Mapping[str, Any]) -> Label:
    """The label of a layer as a checkpoint's configuration has it (``quant_algo``, ``group_size``).

    Raises:
        Unsupported: A label that is not understood.
    """
    algo = str(layer.get("quant_algo"))
    if algo not in LABELS:
        raise Unsupported(f"quant_algo {algo} is not one that LayerBits reads ({', '.join(LABELS)})")
    label = LABELS[algo]
    size = layer.get("group_size") or label.block
    if algo == "W4A16_AWQ":
        return _grouped(label, int(str(size)))
    if size != label.block:
        raise Unsupported(f"quant_algo {algo} has group_size {size}, it means {label.block}; export it again")
    return label


def label_of(info: CandidateInfo) -> Label:
    """The label that says what a candidate is.

    Raises:
        Unsupported: No label does; the message says what ModelOpt would write. The candidate stays available as fake
            quantization.
    """
    config = normalise(info.config)
    cfgs = read_config(config).cfgs
    why = _beyond_labels(config, cfgs)
    if why is None:
        weights, inputs = describe(cfgs[WEIGHT]), describe(cfgs[INPUT])
        for label in LABELS.values():
            if label.algo == "W4A16_AWQ" and weights.startswith(_GROUP) and weights.removeprefix(_GROUP).isdigit():
                label = _grouped(label, int(weights.removeprefix(_GROUP)))
            if (label.weights, label.inputs) == (weights, inputs):
                return label
        why = _misnamed(modelopt_label(info), weights, inputs)
    raise Unsupported(f"{info.name} cannot be exported: {why}; it stays available as fake quantization")


def check_shape(info: CandidateInfo, label: Label, module: str, rows: int, columns: int) -> None:
    """Checks that a weight fits the layout of a label.

    Raises:
        Unsupported: Its blocks would be cut.
    """
    if columns % (label.block or label.packed[1]):
        raise Unsupported(
            f"{module} has {columns} columns, not a multiple of {label.block}: {label.algo} stores whole blocks only; "
            f"leave it unquantized, or use another candidate than {info.name}"
        )
    if rows % label.packed[0]:
        raise Unsupported(f"{module} has {rows} rows, {label.algo} packs two in one; leave it unquantized")


def modelopt_label(info: CandidateInfo) -> str | None:
    """The ``quant_algo`` that ModelOpt derives for a linear under a candidate, ``None`` where it has none."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export.quant_utils import get_quant_config

    from layerbits.probing.apply import runtime_config

    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    try:
        # A forward first: a quantizer learns some of its shape from what it sees.
        with redirect_stdout(io.StringIO()):
            mtq.quantize(model, runtime_config(info, torch.device("cpu")), lambda m: m(torch.ones(2, 128)))
        algo = get_quant_config(model)["quantization"]["quant_algo"]
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError, UserError):
        return None
    return None if algo is None else str(algo)


def _grouped(label: Label, size: int) -> Label:
    return replace(label, weights=f"{_GROUP}{size}", block=size)


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
        settings = QuantizerAttributeConfig(**{k: v for k, v in cfg.items() if k != "backend"})
        if unknown := sorted(set(settings.model_dump(exclude_defaults=True)) - _GRANULARITY):
            return f"its {quantizer} sets {', '.join(unknown)}, which no label expresses"
        blocks = cfg.get("block_sizes") or {}
        if cfg.get("num_bits") == FP4 and block_lengths(cfg) and blocks.get("type") != "dynamic":
            return f"the block scales of its {quantizer} are static, only dynamic ones are proven"
    return None


def _misnamed(algo: str | None, weights: str, inputs: str) -> str:
    scored = f"scored was {weights} x {'activations untouched' if inputs == '-' else inputs}"
    if algo is None:
        return f"ModelOpt has no label for it ({scored})"
    if algo not in LABELS:
        return f"ModelOpt would label it {algo}, which is no label whose meaning is proven here ({scored})"
    meant = LABELS[algo]
    what = f"{meant.weights} x {'activations untouched' if meant.inputs == '-' else meant.inputs}"
    return f"ModelOpt would label it {algo}, which means {what} ({scored})"


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)
