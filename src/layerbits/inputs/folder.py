"""Whether a folder holds a checkpoint that can be loaded whole, told from its files before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerbits.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_POINTER = b"version https://git-lfs.github.com/spec"
_TEXT = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
# A file that only this kind of folder has (a glob), what the folder is, and what to give instead.
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


def check_folder(folder: Path, random_weights: bool = False) -> dict[str, Any]:
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
        raise UserError(f"there is no folder {folder}; set model.path to a checkpoint folder or a Hugging Face id")
    if (folder / "adapter_config.json").is_file():
        raise UserError(_adapter(folder))
    if not (folder / "config.json").is_file():
        raise UserError(_without_config(folder))
    for name in _TEXT:
        if (folder / name).is_file():
            _no_pointer(folder / name)
    config = read_json(folder / "config.json")
    if not random_weights:
        _check_weights(folder)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: It does not.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load the weights from, safetensors first; empty where there are none.

    Raises:
        UserError: The index is damaged, or names files that are not there.
    """
    for name, index in zip(WEIGHTS, INDEXES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if not (folder / index).is_file():
            continue
        names = read_json(folder / index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{folder / index} has no weight_map; fetch it again")
        files = [folder / shard for shard in sorted({str(shard) for shard in names.values()})]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(files)} files that its index names ({few(missing)}); "
                "fetch them again"
            )
        return files
    return []


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a safetensors file, from its header alone.

    The layout is the one of https://github.com/huggingface/safetensors#format.

    Returns:
        Name → dtype as safetensors writes it, and shape.

    Raises:
        UserError: The file is not whole.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        found = {
            str(name): (str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(entry["data_offsets"][1]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise UserError(f"{file} is no safetensors file: its header is damaged or cut off; fetch it again") from None
    end = 8 + length + max((stop for *_, stop in found.values()), default=0)
    if end > size:
        raise UserError(f"{file} is truncated: {size:,} of {end:,} bytes; fetch it again")
    return {name: (dtype, shape) for name, (dtype, shape, _) in found.items()}


def few(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _adapter(folder: Path) -> str:
    """What an adapter is told with: its base, and how to merge it."""
    said = read_json(folder / "adapter_config.json")
    base = said.get("base_model_name_or_path") or "a base model that it does not name"
    kind = f"a {said.get('peft_type') or 'PEFT'} adapter"
    loader = "peft.AutoPeftModelForCausalLM"
    return (
        f"{folder} is {kind} of {base}, not a model: merge it first ({loader}.from_pretrained({str(folder)!r})"
        ".merge_and_unload().save_pretrained(DIR)) and give DIR with the base model's tokenizer"
    )


def _without_config(folder: Path) -> str:
    for pattern, what, mend in _KINDS:
        if any(folder.glob(pattern)):
            return f"{folder} holds {what}; {mend}"
    inner = sorted(folder.glob("*/config.json")) or sorted(folder.glob("snapshots/*/config.json"))
    if inner:
        names = [str(file.parent.relative_to(folder)) for file in inner]
        return f"{folder} has no config.json itself, but its folders have: give one of {few(names)}"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return f"{folder} has weights but no config.json; fetch the model's config.json and tokenizer files too"
    if any(folder.glob("tokenizer*")):
        return f"{folder} holds a tokenizer but no model; fetch config.json and the weights too"
    return f"{folder} is not a checkpoint folder: it has no config.json"


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise UserError(_without_weights(folder))
    for file in files:
        _no_pointer(file)
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; fetch it again")
        if file.suffix == ".safetensors":
            read_header(file)


def _without_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"{folder} has {len(shards)} shards but no {INDEXES[0]}; fetch the index too"
    for pattern, what, mend in _KINDS:
        if any(folder.glob(pattern)):
            return f"{folder} holds {what}; {mend}"
    others = sorted(file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    if others:
        return f"{folder} has no {WEIGHTS[0]}, only {few(others)}; save the model with save_pretrained"
    return f"{folder} is not a complete checkpoint: it has no weights ({WEIGHTS[0]}); fetch them, or save the model"


def _no_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a pointer of Git LFS, not the file; run `git lfs pull` in {file.parent}")
