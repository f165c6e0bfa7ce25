"""``config.json`` of an export: the source's, key by key, with what an export has to change.

Runtimes read it with whichever ``transformers`` they have, so it is not written anew by ours: version 5 leaves out or
moves keys that version 4 reads (``rope_theta``, ``rope_scaling``, ``torch_dtype``, ``sliding_window``, the text keys of
Qwen2.5-VL).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerbits.inputs.files import few, read_json
from layerbits.plain import JsonMapping

FILE = "config.json"

_DTYPES = ("dtype", "torch_dtype")
_QUANTIZATION = ("quantization_config", "compression_config")
_ABSENT = "absent"


@dataclass(frozen=True)
class ConfigProof:
    """What comparing the configuration found.

    Attributes:
        same: Keys with the value that the source has, nested ones counted.
        changed: What an export has to change, in words.
        problems: Every other difference, in words.
    """

    same: int
    changed: tuple[str, ...]
    problems: tuple[str, ...]


def write_config(source: Path, folder: Path, quantization: JsonMapping, dtype: str, architecture: str) -> None:
    """Writes the configuration of an export.

    Args:
        source: Folder of the checkpoint that was scored.
        folder: The export.
        quantization: Its ``quantization_config``.
        dtype: Of the tensors that are not quantized, as torch names it.
        architecture: Class of the model, for a source that names none.
    """
    config = {key: value for key, value in read_json(source / FILE).items() if key not in _QUANTIZATION}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTIZATION:
            part.pop(key, None)
        part.update({key: dtype for key in _DTYPES if key in part})
    config["dtype"] = dtype  # version 5 of transformers; version 4 reads torch_dtype
    if not config.get("architectures"):
        config["architectures"] = [architecture]
    config["quantization_config"] = dict(quantization)
    (folder / FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def compare_config(source: Path, folder: Path, dtype: str) -> ConfigProof:
    """Compares the configuration of an export with the source's, key by key.

    Args:
        source: Folder of the checkpoint that was scored.
        folder: The export.
        dtype: Of its tensors that are not quantized.
    """
    theirs, ours = dict(_values(read_json(source / FILE))), dict(_values(read_json(folder / FILE)))
    changed: list[str] = []
    problems: list[str] = []
    same = 0
    for key in dict.fromkeys((*theirs, *ours)):
        before, after = theirs.get(key, _ABSENT), ours.get(key, _ABSENT)
        if before == after:
            same += 1
            continue
        words = f"{key}: {_shown(before)} in the source, {_shown(after)} in the export"
        leaf = key.rpartition(".")[2]
        needed = (
            leaf in _QUANTIZATION
            or (leaf in _DTYPES and after == dtype)
            or (key == "architectures" and before in (_ABSENT, None, []))
        )
        (changed if needed else problems).append(words)
    if problems:
        problems = [f"config.json is not the source's: {few(problems)}"]
    return ConfigProof(same, tuple(changed), tuple(problems))


def _values(config: JsonMapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested keys with dots between them, and their values; a quantization is one value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value and key not in _QUANTIZATION:
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    if value is _ABSENT:
        return _ABSENT
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
