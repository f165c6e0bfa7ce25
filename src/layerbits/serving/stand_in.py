"""A folder that vLLM loads with random weights (``--load-format dummy``): a model's config with fewer blocks.

What a linear takes depends on its shape and layout alone, so that blocks of the real shapes stand in for the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from layerbits.checkpoint.config_file import FILE
from layerbits.checkpoint.files import KEPT, copy_files
from layerbits.checkpoint.label import MODELOPT, Label
from layerbits.inputs.files import read_json
from layerbits.plain import JsonObject

if TYPE_CHECKING:
    from layerbits.inputs.models import ResolvedModel

_TEXT = ("text_config", "llm_config", "language_config")
_BLOCKS = "num_hidden_layers"
NOTHING: Mapping[str, Label] = MappingProxyType({})


@dataclass(frozen=True)
class Stored:
    """A quantized linear.

    Attributes:
        module: Name in memory.
        stored: Name in the files.
    """

    module: str
    stored: str
    label: Label


def small_files(resolved: ResolvedModel) -> Path:
    """The folder with a model's ``config.json`` and its tokenizer; fetched from the hub without the weights."""
    folder = Path(resolved.source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved.source, revision=resolved.spec.revision, allow_patterns=[*KEPT]))


def block_count(config: JsonObject) -> int:
    """Decoder blocks of a config."""
    return int(_text(config)[_BLOCKS])


def has_pictures(config: JsonObject) -> bool:
    """Whether it has a vision tower."""
    return "vision_config" in config


def positions(config: JsonObject) -> int | None:
    """Tokens of the longest text; ``None`` where it does not say."""
    found = _text(config).get("max_position_embeddings")
    return None if found is None else int(found)


def write_stand_in(
    folder: Path,
    resolved: ResolvedModel,
    dtype: str,
    blocks: int,
    labels: Mapping[str, Label] = NOTHING,
) -> Path:
    """Writes the folder.

    Args:
        folder: Where to; replaced.
        resolved: The model.
        dtype: Of what is not quantized, as torch names it.
        blocks: How many of its decoder blocks, the first ones.
        labels: Name in memory of each quantized linear → how it is stored; all of one format, in ModelOpt's all alike.
            Those of later blocks are left out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = small_files(resolved)
    copy_files(source, folder)
    made = _shortened(read_json(source / FILE), blocks)
    for part in (made, _text(made)):
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
        part.pop("quantization_config", None)
    made["dtype"] = dtype
    if not made.get("architectures"):
        from layerbits.inputs.loading import empty_model

        made["architectures"] = [type(empty_model(resolved)).__name__]
    _write(folder, made)
    if labels:
        made["quantization_config"] = _quantization(folder, resolved, labels)
        _write(folder, made)
    return folder


def _write(folder: Path, config: JsonObject) -> None:
    (folder / FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _text(config: JsonObject) -> JsonObject:
    """The part that the language model is built of."""
    return next((config[key] for key in _TEXT if _BLOCKS in (config.get(key) or {})), config)


def _shortened(config: JsonObject, blocks: int) -> JsonObject:
    """The config with fewer blocks; lists with an entry a block are cut."""
    made: JsonObject = json.loads(json.dumps(config))
    part = _text(made)
    total = part[_BLOCKS]
    for key, value in part.items():
        if isinstance(value, list) and len(value) == total:
            part[key] = value[:blocks]
    part[_BLOCKS] = blocks
    return made


def _quantization(folder: Path, resolved: ResolvedModel, labels: Mapping[str, Label]) -> Mapping[str, object]:
    from layerbits.checkpoint.write_compressed import left_alone, quantization_config
    from layerbits.inputs.loading import empty_model
    from layerbits.inputs.models import resolve
    from layerbits.inputs.names import names_on_disk

    spec = replace(resolved.spec, path=str(folder), revision=None, random_weights=True)
    model = empty_model(resolve(spec))
    there = {name for name, _ in model.named_modules()}
    quantized = {name: label for name, label in labels.items() if name in there}
    on_disk = names_on_disk(model)
    if any(label.format == MODELOPT for label in quantized.values()):
        (algo,) = {label.algo for label in quantized.values()}
        towers, names = left_alone(model, quantized, on_disk)
        ignore = [f"*{name}.*" if name in towers else name for name in names]
        return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ignore}
    stored = {name: on_disk[f"{name}.weight"].removesuffix(".weight") for name in quantized}
    layers = [Stored(name, stored[name], label) for name, label in quantized.items()]
    return quantization_config(model, layers, on_disk, ())
