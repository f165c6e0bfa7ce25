"""ModelOpt's exports: the labels of ``hf_quant_config.json``, and which of them would name something else.

ModelOpt 0.47 derives a label (``quant_algo``) from the weight quantizer almost alone, so for some candidates it names
other activations, or another granularity, than what was scored. Those are refused by name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from layerbits.checkpoint.files import read_json
from layerbits.checkpoint.label import (
    INPUT_FP8,
    INPUT_FP8_TOKEN,
    INPUT_INT8,
    INPUT_NVFP4,
    MODELOPT,
    NVFP4_DIVISOR,
    Label,
    meaning,
)
from layerbits.checkpoint.layouts.base import Layout, Scale
from layerbits.checkpoint.layouts.fp4 import mxfp4, nvfp4
from layerbits.checkpoint.layouts.int4_rows import int4_rows
from layerbits.checkpoint.layouts.values import values
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import Unsupported, UserError
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.result import CandidateInfo

FILE = "hf_quant_config.json"

_GROUP = "INT4 per group of "
_PACKED = (torch.uint8, torch.int8, torch.float8_e4m3fn)


def _weight(divisor: float) -> Scale:
    return Scale("weight_scale", divisor)


def _second(divisor: float) -> Layout:
    return nvfp4("weight", Scale("weight_scale_2", divisor))


def _input(divisor: float) -> Scale:
    return Scale("input_scale", divisor)


def _label(
    algo: str,
    weights: str,
    inputs: str,
    layout: Layout,
    arithmetic: str | None = None,
    input_scale: Scale | None = None,
    one_scale: bool = False,
) -> Label:
    return Label(MODELOPT, algo, weights, inputs, layout, arithmetic, input_scale, one_scale)


_FP8_STATIC = (INPUT_FP8, _input(448.0))

LABELS = {
    label.algo: label
    for label in (
        _label(
            "FP8",
            "FP8 per tensor",
            "FP8 per tensor",
            values("float8_e4m3fn", None, _weight(448.0)),
            *_FP8_STATIC,
            one_scale=True,
        ),
        _label(
            "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8 per output channel",
            "FP8 per token, dynamic",
            values("float8_e4m3fn", 0, _weight(448.0)),
            INPUT_FP8_TOKEN,
        ),
        _label("W8A16", "INT8 per output channel", "-", values("int8", 0, _weight(127.0))),
        _label(
            "W8A8_SQ_PER_CHANNEL",
            "INT8 per output channel",
            "INT8 per tensor",
            values("int8", 0, _weight(127.0)),
            INPUT_INT8,
            _input(127.0),
        ),
        _label("W4A16_AWQ", _GROUP + "128", "-", int4_rows(128, _weight(7.0))),
        _label("W4A16_NVFP4", "NVFP4 per 16", "-", _second(NVFP4_DIVISOR), one_scale=True),
        _label(
            "NVFP4",
            "NVFP4 per 16",
            "NVFP4 per 16",
            _second(NVFP4_DIVISOR),
            INPUT_NVFP4,
            _input(NVFP4_DIVISOR),
            one_scale=True,
        ),
        # Runtimes multiply the FP4 values into FP8, so the block scales stay below 448 / 6.
        _label("W4A8_NVFP4_FP8", "NVFP4 per 16", "FP8 per tensor", _second(448.0), *_FP8_STATIC, one_scale=True),
        _label("W4A8_MXFP4_FP8", "MXFP4 per 32", "FP8 per tensor", mxfp4("weight"), *_FP8_STATIC),
    )
}
"""Labels that are understood, by ``quant_algo``; that of INT4 for groups of 128, see :func:`label_of_layer`."""


def find(weights: str, inputs: str) -> Label | None:
    """The label that means these weights and activations, ``None`` where there is none."""
    for label in LABELS.values():
        if label.algo == "W4A16_AWQ" and weights.startswith(_GROUP) and weights.removeprefix(_GROUP).isdigit():
            label = _grouped(label, int(weights.removeprefix(_GROUP)))
        if (label.weights, label.inputs) == (weights, inputs):
            return label
    return None


def why_not(info: CandidateInfo, weights: str, inputs: str) -> str:
    """Why a candidate has no label: what ModelOpt would write, and what that means."""
    scored = f"scored was {meaning(weights, inputs)}"
    algo = modelopt_label(info)
    if algo is None:
        return f"ModelOpt has no label for it ({scored})"
    if algo not in LABELS:
        return f"ModelOpt would label it {algo}, which is no label whose meaning is proven here ({scored})"
    meant = LABELS[algo]
    return f"ModelOpt would label it {algo}, which means {meaning(meant.weights, meant.inputs)} ({scored})"


def modelopt_label(info: CandidateInfo) -> str | None:
    """The ``quant_algo`` that ModelOpt derives for a linear under a candidate, ``None`` where it has none."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import get_quant_config

    from layerbits.candidates.runtime import runtime_config

    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    try:
        # A forward first: a quantizer learns some of its shape from what it sees.
        with redirect_stdout(io.StringIO()):
            mtq.quantize(model, runtime_config(info, torch.device("cpu")), lambda m: m(torch.ones(2, 128)))
        algo = get_quant_config(model)["quantization"]["quant_algo"]
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError, UserError):
        return None
    return None if algo is None else str(algo)


def label_of_layer(layer: JsonMapping) -> Label:
    """The label of a layer as a checkpoint's configuration has it (``quant_algo``, ``group_size``).

    Raises:
        Unsupported: A label that is not understood.
    """
    algo = str(layer.get("quant_algo"))
    if algo not in LABELS:
        raise Unsupported(f"quant_algo {algo} is not one that LayerBits reads ({', '.join(LABELS)})")
    label = LABELS[algo]
    size = layer.get("group_size") or label.layout.block
    if algo == "W4A16_AWQ":
        return _grouped(label, int(str(size)))
    if size != label.layout.block:
        raise Unsupported(f"quant_algo {algo} has group_size {size}, it means {label.layout.block}; export it again")
    return label


def read(checkpoint: Checkpoint) -> Quantization:
    """Reads ``hf_quant_config.json``.

    Raises:
        UserError: It is missing or damaged, or has a label that is not understood.
    """
    details = _details(checkpoint.folder)
    mixed = details.get("quant_algo") == "MIXED_PRECISION"
    if mixed:
        layers = {name: label_of_layer(layer) for name, layer in details.get("quantized_layers", {}).items()}
    else:
        label = label_of_layer(details)
        names = [n for n, e in checkpoint.entries.items() if e.dtype in _PACKED and n.endswith(".weight")]
        layers = {n.removesuffix(".weight"): label for n in names}
    exclude = tuple(details.get("exclude_modules") or ())
    return Quantization(MODELOPT, layers, exclude, details.get("kv_cache_quant_algo"), mixed)


def config_problems(folder: Path) -> Iterator[str]:
    """Where ``config.json`` and ``hf_quant_config.json`` disagree."""
    embedded = read_json(folder / "config.json").get("quantization_config") or {}
    details = _details(folder)
    if embedded.get("quant_algo") != details.get("quant_algo"):
        yield f"config.json says {embedded.get('quant_algo')}, {FILE} {details.get('quant_algo')}"
    if embedded.get("quantized_layers") != details.get("quantized_layers"):
        yield f"config.json and {FILE} list different layers"
    if list(embedded.get("ignore") or ()) != list(details.get("exclude_modules") or ()):
        yield f"config.json and {FILE} exclude different modules"


def _details(folder: Path) -> JsonObject:
    details = read_json(folder / FILE).get("quantization", {})
    assert isinstance(details, dict)
    return details


def _grouped(label: Label, size: int) -> Label:
    return replace(label, weights=f"{_GROUP}{size}", layout=int4_rows(size, _weight(7.0)))
