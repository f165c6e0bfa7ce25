"""compressed-tensors' exports: labels as ``config_groups``, with ``ignore`` for what stays as it is.

A scheme of that format (``QuantizationScheme``) says weights and activations apart, so a label here is any pair of the
two, in one of the library's storage formats. Scales are stored in bfloat16 even where the model is float32: runtimes
read most of them in the model's dtype, and a number that bfloat16 has is never rounded on the way.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layerbits.checkpoint.files import read_json
from layerbits.checkpoint.label import (
    COMPRESSED,
    INPUT_FP8,
    INPUT_FP8_TOKEN,
    INPUT_INT8,
    INPUT_INT8_TOKEN,
    INPUT_MXFP4,
    INPUT_MXFP8,
    INPUT_NVFP4,
    NVFP4_DIVISOR,
    Label,
    meaning,
)
from layerbits.checkpoint.layouts.base import Layout, Scale, dtype_named
from layerbits.checkpoint.layouts.fp4 import mxfp4, nvfp4
from layerbits.checkpoint.layouts.int_words import int_words
from layerbits.checkpoint.layouts.values import values
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import Unsupported, UserError
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.result import CandidateInfo

SCALE_DTYPE = "bfloat16"

_DIVISORS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_REGEX = "re:"
"""How a target starts that is a regular expression, not a name."""
_GROUP = re.compile(r"(INT[48]) per group of (\d+)")


@dataclass(frozen=True)
class Args:
    """What ``QuantizationArgs`` says of weights or activations; ``dynamic`` may be ``"local"``."""

    num_bits: int
    type: str
    strategy: str
    group_size: int | None = None
    dynamic: bool | str = False
    scale_dtype: str | None = None

    @classmethod
    def read(cls, data: JsonMapping) -> Args:
        """From a checkpoint's configuration.

        Raises:
            UserError: It says something that no label here means.
        """
        try:
            made = cls(
                int(data["num_bits"]),
                str(data["type"]),
                str(data["strategy"]),
                data.get("group_size"),
                data.get("dynamic", False),
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(f"quantization arguments {data} are damaged; export it again") from None
        if not data.get("symmetric", True) or data.get("actorder"):
            raise Unsupported("asymmetric and reordered weights are not read by LayerBits")
        return made

    def same(self, other: Args) -> bool:
        """Whether both mean the same; what dtype a scale has, the layout says."""
        return self.key == other.key

    @property
    def key(self) -> tuple[int | str | bool | None, ...]:
        """All but the dtype of the scale."""
        return self.num_bits, self.type, self.strategy, self.group_size, self.dynamic


@dataclass(frozen=True)
class _Weights:
    word: str
    args: Args


@dataclass(frozen=True)
class _Inputs:
    word: str
    args: Args
    arithmetic: str
    scale: Scale | None = None


WEIGHTS = {
    "INT8 per output channel": _Weights("INT8_CHANNEL", Args(8, "int", "channel")),
    "INT8 per tensor": _Weights("INT8_TENSOR", Args(8, "int", "tensor")),
    "INT4 per output channel": _Weights("INT4_CHANNEL", Args(4, "int", "channel")),
    "FP8 per output channel": _Weights("FP8_CHANNEL", Args(8, "float", "channel")),
    "FP8 per tensor": _Weights("FP8_TENSOR", Args(8, "float", "tensor")),
    "NVFP4 per 16": _Weights("NVFP4", Args(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")),
    "MXFP4 per 32": _Weights("MXFP4", Args(4, "float", "group", 32, scale_dtype="torch.uint8")),
    "MXFP8 per 32": _Weights("MXFP8", Args(8, "float", "group", 32, scale_dtype="torch.uint8")),
}
"""Weights by what they are, as :func:`layerbits.candidates.description.describe` says; integers in groups besides."""


def _static(divisor: float) -> Scale:
    return Scale("input_scale", divisor, SCALE_DTYPE, keepdim=True)


def _global(part: str) -> Scale:
    return Scale(part, NVFP4_DIVISOR, inverse=True, keepdim=True)


INPUTS = {
    "INT8 per token, dynamic": _Inputs("INT8_TOKEN", Args(8, "int", "token", dynamic=True), INPUT_INT8_TOKEN),
    "INT8 per tensor": _Inputs("INT8_TENSOR", Args(8, "int", "tensor"), INPUT_INT8, _static(127.0)),
    "FP8 per token, dynamic": _Inputs("FP8_TOKEN", Args(8, "float", "token", dynamic=True), INPUT_FP8_TOKEN),
    "FP8 per tensor": _Inputs("FP8_TENSOR", Args(8, "float", "tensor"), INPUT_FP8, _static(448.0)),
    "NVFP4 per 16": _Inputs(
        "NVFP4",
        Args(4, "float", "tensor_group", 16, "local", "torch.float8_e4m3fn"),
        INPUT_NVFP4,
        _global("input_global_scale"),
    ),
    "MXFP4 per 32": _Inputs("MXFP4", Args(4, "float", "group", 32, True, "torch.uint8"), INPUT_MXFP4),
    "MXFP8 per 32": _Inputs("MXFP8", Args(8, "float", "group", 32, True, "torch.uint8"), INPUT_MXFP8),
}


@functools.cache
def find(weights: str, inputs: str) -> Label | None:
    """The label that means these weights and activations, ``None`` where the library cannot say it."""
    known = _weights(weights)
    if known is None or _misread(weights, inputs):
        return None
    if inputs == "-":
        return _label(known, weights, None)
    return _label(known, weights, inputs) if inputs in INPUTS else None


def why_not(_info: CandidateInfo, weights: str, inputs: str) -> str:
    """Why a candidate has no label."""
    scored = f"scored was {meaning(weights, inputs)}"
    return f"{_misread(weights, inputs)} ({scored})" if _weights(weights) else f"it has no layout for that ({scored})"


def _misread(weights: str, inputs: str) -> str:
    """What a runtime would compute instead, where it takes a scheme for another one; empty where it does not.

    Read in vLLM 0.32.0 (``CompressedTensorsConfig._get_scheme_from_parts``).
    """
    if inputs == "-":
        return ""
    if inputs not in INPUTS:
        return "it has no layout for these activations"
    if weights.startswith("MXFP4") and inputs not in ("MXFP4 per 32", "FP8 per token, dynamic"):
        return "vLLM would take MXFP4 weights with such activations for MXFP4 activations, or leave them untouched"
    if weights.startswith("FP8") and not inputs.startswith("FP8"):
        return "vLLM would leave the activations of FP8 weights untouched"
    if weights.startswith("INT8") and not inputs.startswith("INT8"):
        return "vLLM would take 8-bit activations of INT8 weights for INT8"
    if weights.startswith("MXFP8") and inputs != "MXFP8 per 32":
        return "vLLM would take the activations of MXFP8 weights for MXFP8"
    in_blocks = " per 32" in inputs or " per 16" in inputs
    return "no kernel is known for such activations beside these weights" if in_blocks and inputs != weights else ""


def storage(label: Label) -> str:
    """The library's name of the storage format of a label."""
    weights = _weights(label.weights)
    assert weights is not None
    if weights.word in ("NVFP4", "MXFP4"):
        return f"{weights.word.lower()}-pack-quantized"
    if weights.word == "MXFP8":
        return "mxfp8-quantized"
    if weights.args.type == "float":
        return "float-quantized"
    return "pack-quantized" if label.layout.tensor == "weight_packed" else "int-quantized"


def scheme_of(label: Label) -> JsonObject:
    """A label as the fields of the library's ``QuantizationScheme``, without targets."""
    weights, inputs = _weights(label.weights), INPUTS.get(label.inputs)
    assert weights is not None
    return {
        "weights": _fields(weights.args),
        "input_activations": None if inputs is None else _fields(inputs.args),
        "format": storage(label),
    }


def read(checkpoint: Checkpoint) -> Quantization:
    """Reads the ``quantization_config`` of ``config.json``.

    Raises:
        UserError: It is damaged, or has a scheme that is not understood.
    """
    config = read_json(checkpoint.folder / "config.json")["quantization_config"]
    ignore = tuple(config.get("ignore") or ())
    groups = [(tuple(g.get("targets") or ()), label_of_group(g)) for g in (config.get("config_groups") or {}).values()]
    named = {target: label for targets, label in groups for target in targets if not target.startswith(_REGEX)}
    if overall := named.get("Linear"):
        layout = overall.layout
        ours = [n for n, e in checkpoint.entries.items() if e.dtype == dtype_named(layout.dtype)]
        layers = {n.removesuffix(f".{layout.tensor}"): overall for n in ours if n.endswith(f".{layout.tensor}")}
    else:
        there = {name for name, label in named.items() if f"{name}.{label.layout.tensor}" in checkpoint}
        tails = {tail(name) for name in there}
        layers = {name: label for name, label in named.items() if name in there or tail(name) not in tails}
    return Quantization(COMPRESSED, layers, ignore, None, overall is None)


def head_target(module: str) -> str:
    """The target that vLLM finds a quantized output head by.

    Its class there is no ``Linear``, and in vision-language models its name has the language model's before it.
    """
    return rf"{_REGEX}(.*\.)?{re.escape(module.rpartition('.')[2])}$"


def tail(module: str) -> tuple[str, ...]:
    """What two names of one module have in common: transformers may call it otherwise in memory than in files."""
    return tuple(module.split(".")[-4:])


def label_of_group(group: JsonMapping) -> Label:
    """The label of one of the ``config_groups``.

    Raises:
        UserError: It is not understood, or its storage format is not the label's.
    """
    weights = Args.read(group.get("weights") or {})
    inputs = None if group.get("input_activations") is None else Args.read(group["input_activations"])
    words = [w for w, known in WEIGHTS.items() if known.args.same(weights)]
    if weights.strategy == "group" and weights.type == "int":
        words = [f"INT{weights.num_bits} per group of {weights.group_size}"]
    others = ["-"] if inputs is None else [w for w, known in INPUTS.items() if known.args.same(inputs)]
    label = find(words[0], others[0]) if words and others else None
    if label is None:
        raise Unsupported(f"a config group with weights {weights} and activations {inputs} is not read by LayerBits")
    if group.get("format") != storage(label):
        raise UserError(
            f"the config group of {label.algo} says format {group.get('format')}, it means {storage(label)}; "
            "export it again"
        )
    return label


def config_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the ``quantization_config`` itself."""
    config = read_json(folder / "config.json")["quantization_config"]
    groups = list((config.get("config_groups") or {}).values())
    formats = {group.get("format") for group in groups}
    overall = next(iter(formats)) if len(formats) == 1 else "mixed-precision"
    if config.get("format") != overall:
        yield f"quantization_config says format {config.get('format')}, its groups {overall}"
    if config.get("quantization_status") != "compressed":
        yield f"quantization_status is {config.get('quantization_status')}, the weights are compressed"
    targets = [target for group in groups for target in group.get("targets") or ()]
    if twice := next((t for t in targets if targets.count(t) > 1), None):
        yield f"{twice} is a target of two config groups"


def _weights(words: str) -> _Weights | None:
    if match := _GROUP.fullmatch(words):
        bits, size = int(match[1].removeprefix("INT")), int(match[2])
        return _Weights(f"{match[1]}_GROUP{size}", Args(bits, "int", "group", size))
    return WEIGHTS.get(words)


def _label(weights: _Weights, words: str, inputs: str | None) -> Label:
    activations = None if inputs is None else INPUTS[inputs]
    static_fp8 = words == "FP8 per tensor" and inputs is not None
    return Label(
        format=COMPRESSED,
        algo=f"{weights.word}-{'A16' if activations is None else activations.word}",
        weights=words,
        inputs=inputs or "-",
        layout=_layout(weights, activations),
        arithmetic=None if activations is None else activations.arithmetic,
        input_scale=None if activations is None else activations.scale,
        one_scale=weights.word == "NVFP4" or static_fp8,
    )


def _layout(weights: _Weights, inputs: _Inputs | None) -> Layout:
    args = weights.args
    if weights.word == "NVFP4":
        return nvfp4("weight_packed", _global("weight_global_scale"))
    if weights.word == "MXFP4":
        return mxfp4("weight_packed")
    if weights.word == "MXFP8":
        return values("float8_e4m3fn", 32, Scale("weight_scale", None, "uint8"))
    kind = f"{'int' if args.type == 'int' else 'fp'}{args.num_bits}"
    scale = Scale("weight_scale", _DIVISORS[kind], SCALE_DTYPE, keepdim=True)
    block = {"tensor": None, "channel": 0}.get(args.strategy, args.group_size)
    # Weights alone are packed, and those that a kernel multiplies with FP8; INT8 kernels take one value a byte.
    if args.type == "int" and (inputs is None or (kind == "int4" and inputs.args.type == "float")):
        return int_words(args.num_bits, block, scale)
    return values("int8" if args.type == "int" else "float8_e4m3fn", block, scale)


def _fields(args: Args) -> JsonObject:
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "symmetric": True,
        "group_size": args.group_size,
        "strategy": args.strategy,
        "dynamic": args.dynamic,
        "scale_dtype": args.scale_dtype,
    }
