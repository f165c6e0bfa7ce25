"""The files of a checkpoint that hold no weights."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from layerbits.errors import UserError
from layerbits.inputs import files
from layerbits.plain import JsonObject

KEPT = (
    *("*.json", "*.jinja", "*.model", "*.model.*", "*.txt", "*.py", "*.tiktoken", "*.bpe", "*.spm", "*.vocab"),
    *("tokenizer*", "vocab*", "merges*", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*", "README*", "*.md"),
)
"""What runtimes and readers of a checkpoint look for: tokenizer, processor, templates, code, licence."""
_LEFT = (
    *("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json", "*.index.json"),
    *("trainer_state*", "training_args*", "all_results*", "train_results*", "eval_results*", "log*.txt"),
    *("optimizer*", "scheduler*", "rng_state*", "zero_to_fp32.py", "adapter_*", "*.safetensors"),
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "layerbits.json"),
)
"""Of those, what an export has of its own, and what training left behind."""
_TEMPLATES = "*template*/*.jinja"
"""Further chat templates, which transformers keeps in ``additional_chat_templates``."""


def read_json(file: Path) -> JsonObject:
    """The object in a file of an export.

    Raises:
        UserError: There is no such file, or it holds no object.
    """
    if not file.is_file():
        raise UserError(f"{file.parent} has no {file.name}; it is not an export")
    return files.read_json(file)


def copy_files(source: Path, folder: Path) -> None:
    """What belongs to a model beside its weights and its configuration: tokenizer, processor, templates, code, licence.

    Weights, the state of a training and other files are left where they are.
    """
    for file in (*sorted(source.iterdir()), *sorted(source.glob(_TEMPLATES))):
        kept = any(fnmatch(file.name, pattern) for pattern in KEPT)
        left = any(fnmatch(file.name, pattern) for pattern in _LEFT) or file.name.startswith(".")
        if kept and not left and file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def check_same_code(source: Path, folder: Path) -> None:
    """Makes sure that the code beside an export, which is about to run, is that of the model that was scored.

    Raises:
        UserError: It is not.
    """
    for file in sorted(folder.glob("*.py")):
        if not (source / file.name).is_file() or file.read_bytes() != (source / file.name).read_bytes():
            raise UserError(f"{file} is not the code of {source}, which was trusted; read it, and export again")
