"""Whether a checkpoint is quantized already: scoring it would score something else than the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError
from layerbits.inputs.files import few, read_json
from layerbits.inputs.weights import read_header, weight_files
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.experiment import made_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

EXPORT = "layerbits.json"
"""What an export of LayerBits leaves beside its weights."""

DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Methods that transformers turns back into plain linears on load, with its class that says so.

Of the others, transformers 5.14 keeps compressed-tensors' activation quantizers in the model after it decompressed the
weights, and the rest needs packages of its own.
"""

_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_WIDE = ("F64", "F32", "F16", "BF16")
_BITS = ("bits", "w_bit", "wbits", "weight_bits", "nbits")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: ``quant_method`` as transformers names it; empty where no configuration says so.
        words: The same for a reader, with bits and producer.
        said: Where it is said.
    """

    method: str
    words: str
    said: str


def find_quantization(config: JsonMapping, folder: Path | None) -> Quantization | None:
    """Looks for quantization in what a checkpoint says of itself.

    Args:
        config: Contents of ``config.json``.
        folder: The checkpoint where it is on this machine: its other files are asked, and the headers of its weights.

    Raises:
        UserError: A file that says it is damaged.
    """
    parts = {"config.json": config, **{f"{k} of config.json": v for k, v in config.items() if isinstance(v, Mapping)}}
    for where, part in parts.items():
        for key in ("quantization_config", "compression_config"):
            if isinstance(said := part.get(key), Mapping) and said:
                return _described(said, where)
    if folder is None:
        return None
    for name in _BESIDE:
        if (folder / name).is_file() and (said := read_json(folder / name)):
            return _described(said, name)
    narrow = [f"{name} is {dtype}" for name, dtype in _stored(folder) if dtype not in _WIDE and name.endswith("weight")]
    if narrow:
        return Quantization("", f"{len(narrow)} weights are no 16- or 32-bit numbers", f"tensors: {few(narrow, 1)}")
    return None


def check_quantization(config: JsonMapping, source: str, folder: Path | None, dequantize: bool) -> Quantization | None:
    """Refuses what is quantized, unless it is to be dequantized and can be.

    Args:
        config: Contents of ``config.json``.
        source: How to name the checkpoint in an error.
        folder: As :func:`find_quantization` takes it.
        dequantize: ``model.dequantize``.

    Returns:
        What is to be dequantized on load, ``None`` for a model that is not quantized.

    Raises:
        UserError: It is quantized and must not be, or the other way round; or transformers cannot dequantize it.
    """
    quantization = find_quantization(config, folder)
    if quantization is None:
        if dequantize:
            raise UserError(f"model.dequantize=true, but {source} is not quantized; leave model.dequantize out")
        return None
    made = None if folder is None else made_by(folder)
    by = f"; made by {made}" if made else ""
    quantized = f"{source} is already quantized: {quantization.words} ({quantization.said}{by})"
    if folder is not None and (origin := _origin(folder)):
        raise UserError(f"{quantized}; {origin}")
    original = "give the checkpoint that it was made from"
    if quantization.method not in DEQUANTIZED:
        if dequantize:
            raise UserError(
                f"{quantized}; model.dequantize=true works for {', '.join(DEQUANTIZED)} alone, as transformers leaves "
                f"no plain linears of others: {original}"
            )
        raise UserError(f"{quantized}; {original}")
    if not dequantize:
        raise UserError(f"{quantized}; {original}, or set model.dequantize=true to score its numbers in 16 bits")
    return quantization


def dequantizing(quantization: Quantization) -> QuantizationConfigMixin:
    """What ``from_pretrained`` gets as ``quantization_config`` to dequantize on load."""
    import transformers

    return getattr(transformers, DEQUANTIZED[quantization.method])(dequantize=True)


def check_dequantized(model: PreTrainedModel, source: str) -> None:
    """Makes sure that nothing of the quantization is left in a model.

    Raises:
        UserError: A parameter is no wide float, or a linear is not a plain one.
    """
    narrow = [n for n, p in model.named_parameters() if not p.is_floating_point() or p.element_size() < 2]
    odd = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and (type(m) is not torch.nn.Linear or "forward" in vars(m))
    ]
    if left := [*narrow, *odd]:
        raise UserError(
            f"transformers did not dequantize {few(left)} of {source}; give the checkpoint that it was made from"
        )


def _described(said: JsonMapping, where: str) -> Quantization:
    inner = said.get("quantization")  # hf_quant_config.json
    details: JsonObject = {**said, **inner} if isinstance(inner, Mapping) else dict(said)
    method = str(details.get("quant_method") or "")
    if details.get("load_in_4bit") or details.get("load_in_8bit"):
        method = method or "bitsandbytes"
        details.setdefault("bits", 4 if details.get("load_in_4bit") else 8)
    bits = next((f"{details[key]} bits" for key in _BITS if isinstance(details.get(key), int)), "")
    producer = details.get("producer")
    by = (
        " ".join(str(producer[k]) for k in ("name", "version") if producer.get(k)) if isinstance(producer, dict) else ""
    )
    names = dict.fromkeys(str(v) for v in (details.get("quant_algo"), method, details.get("format"), bits) if v)
    words = ", ".join(names) or "in a way that it does not name"
    return Quantization(method, f"{words}, by {by}" if by else words, where)


def _stored(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and dtypes of the tensors in safetensors files."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            yield from ((name, dtype) for name, (dtype, _) in read_header(file).items())


def _origin(folder: Path) -> str:
    """For an export of LayerBits, what it was exported from; empty for anything else."""
    try:
        scheme = read_json(folder / EXPORT)["scheme"]
        name, runs, model = scheme["name"], ", ".join(scheme["source_run_ids"]), scheme["model"]["source"]
    except (UserError, KeyError, TypeError):
        return ""
    return f"LayerBits exported it as {name} from run {runs}; score what was scored there, model.path={model}"
