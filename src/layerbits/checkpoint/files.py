"""The files of a checkpoint that hold no weights."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from layerbits.errors import UserError

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json")
_OWN_FILES = ("config.json", "hf_quant_config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        UserError: There is no such file, or it holds no object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; it is not an export") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object; export it again")
    return value


def copy_files(source: Path, folder: Path) -> None:
    """Everything of the source but weights and the configuration: tokenizer, processor, templates, licence."""
    for file in sorted(source.iterdir()):
        known = file.name in _OWN_FILES or any(fnmatch(file.name, pattern) for pattern in _WEIGHT_FILES)
        if file.is_file() and not known and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
