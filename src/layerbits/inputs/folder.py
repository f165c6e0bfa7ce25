"""Whether a folder holds a checkpoint that can be loaded whole, by its files, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from layerbits.errors import UserError
from layerbits.inputs.files import check_file, few, read_json, unreadable
from layerbits.inputs.weights import INDEXES, WEIGHTS, check_weights, weight_files
from layerbits.paths import home_path
from layerbits.plain import JsonObject

_READ = {".json", ".jinja", ".model", ".txt", ".py", ".safetensors", ".bin"}
"""Kinds of files that a checkpoint is loaded from."""

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Files of a model that sees pictures; it has one of them, or both."""

# A file that only this kind of folder has (a glob), what the folder holds, and what to do instead.
_KINDS = (
    ("model_index.json", "a diffusion pipeline", "give a language model"),
    ("*.gguf", "GGUF weights for llama.cpp", "give the checkpoint that they were made from"),
    ("params.json", "the original layout of Llama or Mistral", "give its Hugging Face version"),
    ("*.nemo", "a NeMo archive", "export it to Hugging Face first"),
    ("*.distcp", "a distributed checkpoint of PyTorch", "save the model with save_pretrained"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint", "run its zero_to_fp32.py and save the model with save_pretrained"),
    ("*.onnx", "an ONNX model", "give the checkpoint that it was exported from"),
    ("tf_model.h5", "TensorFlow weights", "save the model with save_pretrained from PyTorch"),
    ("flax_model.msgpack", "Flax weights", "save the model with save_pretrained from PyTorch"),
)
_FILES = {
    ".gguf": "GGUF weights for llama.cpp; give the folder of the checkpoint that they were made from",
    ".zip": "an archive; unpack it and give the folder",
    ".gz": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
}


def local_folder(path: str) -> Path | None:
    """The folder that ``model.path`` names, there or not; ``None`` for a hub id."""
    local = home_path(path)
    return local if os.path.lexists(local) or path.startswith((".", "/", "~")) else None


def check_folder(folder: Path, random_weights: bool = False) -> JsonObject:
    """Checks everything but the weights themselves.

    Args:
        folder: What ``model.path`` names.
        random_weights: Whether the config alone is needed.

    Returns:
        The contents of ``config.json``.

    Raises:
        UserError: It is no checkpoint, another kind of one, or not whole.
    """
    if folder.is_file():
        what = _FILES.get(folder.suffix, "a file; give the folder that holds it with its config.json")
        raise UserError(f"model.path={folder} is {what}")
    if not folder.is_dir():
        link = f" (it is a link to {os.readlink(folder)})" if folder.is_symlink() else ""
        raise UserError(f"there is no folder {folder}{link}; set model.path to a checkpoint folder or a hub id")
    try:
        return _check_inside(folder, random_weights)
    except OSError as error:
        raise unreadable(folder, error) from None


def check_processor(folder: Path) -> None:
    """Looks for the processor of a vision-language model.

    Raises:
        UserError: The folder has none.
    """
    if not any((folder / name).is_file() for name in PROCESSORS):
        raise UserError(
            f"{folder} has no processor ({' or '.join(PROCESSORS)}): if its model reads text alone, use "
            "dataset=everyday, else put the processor files of the model into the folder"
        )


def _check_inside(folder: Path, random_weights: bool) -> JsonObject:
    files = sorted(file for file in folder.iterdir() if file.suffix in _READ and not file.is_dir())
    for file in files:
        if not (random_weights and file.suffix in (".safetensors", ".bin")):
            check_file(file)
    if (folder / "adapter_config.json").is_file():
        raise UserError(_adapter(folder))
    if not (folder / "config.json").is_file():
        raise UserError(_without_config(folder))
    config = read_json(folder / "config.json")
    if not random_weights:
        weights = weight_files(folder)
        if not weights:
            raise UserError(_without_weights(folder))
        check_weights(folder, weights)
    return config


def _adapter(folder: Path) -> str:
    """The refusal of an adapter: its base, and how to merge it."""
    said = read_json(folder / "adapter_config.json")
    base = said.get("base_model_name_or_path") or "a base model that it does not name"
    kind = f"a {said.get('peft_type') or 'PEFT'} adapter"
    loader = "peft.AutoPeftModelForCausalLM"
    return (
        f"{folder} is {kind} of {base}, not a model: merge it first ({loader}.from_pretrained({str(folder)!r})"
        ".merge_and_unload().save_pretrained(DIR)) and give DIR with the base model's tokenizer"
    )


def _without_config(folder: Path) -> str:
    for pattern, what, instead in _KINDS:
        if any(folder.glob(pattern)):
            return f"{folder} holds {what}; {instead}"
    inner = sorted(folder.glob("*/config.json")) or sorted(folder.glob("snapshots/*/config.json"))
    if inner:
        names = [str(file.parent.relative_to(folder)) for file in inner]
        return f"{folder} has no config.json itself, but its folders have: give one of {few(names)}"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return f"{folder} has weights but no config.json; fetch the model's config.json and tokenizer files too"
    if any(folder.glob("tokenizer*")):
        return f"{folder} holds a tokenizer but no model; fetch config.json and the weights too"
    return f"{folder} is not a checkpoint folder: it has no config.json"


def _without_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"{folder} has {len(shards)} shards but no {INDEXES[0]}; fetch the index too"
    for pattern, what, instead in _KINDS:
        if any(folder.glob(pattern)):
            return f"{folder} holds {what}; {instead}"
    others = sorted(file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    if others:
        return f"{folder} has no {WEIGHTS[0]}, only {few(others)}; save the model with save_pretrained"
    return f"{folder} is not a complete checkpoint: it has no weights ({WEIGHTS[0]}); fetch them, or save the model"
