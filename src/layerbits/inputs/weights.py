"""The weight files of a checkpoint: which of them are loaded, and that they say one thing of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layerbits.errors import UserError, first_line
from layerbits.inputs.files import check_file, few, read_json

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor → its dtype, as safetensors writes it, and its shape."""


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
        files = [folder / shard for shard in sorted(set(weight_map(folder / index).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(files)} files that its index names ({few(missing)}); "
                "fetch them again"
            )
        return files
    return []


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of :func:`weight_files`.

    Raises:
        UserError: There are none, or as :func:`weight_files`.
    """
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    if not files:
        raise UserError(f"{folder} holds no {WEIGHTS[0]}; save the model with save_pretrained")
    return files


def read_header(file: Path) -> Header:
    """The tensors of a weight file without their numbers.

    Args:
        file: A safetensors file, or one of ``torch.save``, of which only plain tensors are unpickled.

    Raises:
        UserError: The file is not whole, or of another kind.
    """
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty; fetch it again")
    return _safetensors_header(file) if file.suffix == ".safetensors" else _torch_header(file)


def check_weights(folder: Path, files: Iterable[Path]) -> None:
    """Checks that every tensor that is loaded has one place: in one file, and in no other that could be meant.

    Args:
        folder: The checkpoint.
        files: From :func:`weight_files`.

    Raises:
        UserError: A file is damaged; or a tensor is in two files, or in none although the index names it.
    """
    files = list(files)
    home: dict[str, Path] = {}
    for file in files:
        check_file(file)
        for name in read_header(file):
            if name in home:
                raise UserError(
                    f"{folder} has two tensors named {name}, in {home[name].name} and in {file.name}, and which "
                    "is loaded is chance; fetch both files again, or save the model with save_pretrained"
                )
            home[name] = file
    if files[0].name not in WEIGHTS:
        index = folder / INDEXES[files[0].suffix != ".safetensors"]
        if lost := [name for name in weight_map(index) if name not in home]:
            raise UserError(f"{folder} lacks tensors that {index.name} names ({few(lost)}); fetch its files again")
    pattern = "*.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model*.bin"
    for other in sorted(set(folder.glob(pattern)) - set(files)):
        try:
            twice = next((name for name in read_header(other) if name in home), None)
        except (UserError, OSError):
            continue  # nobody loads it
        if twice is not None:
            raise UserError(
                f"{folder} has {twice} in {home[twice].name}, which would be loaded, and in {other.name}, which would "
                "not; move the one that is not meant out of the folder"
            )


def weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor → name of its file, as an index says.

    Raises:
        UserError: The index is damaged.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map; fetch it again")
    return {str(name): str(file) for name, file in names.items()}


def _safetensors_header(file: Path) -> Header:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(f"{file} ({size:,} bytes) is no whole safetensors file ({error}); fetch it again") from None


def _torch_header(file: Path) -> Header:
    import pickle
    import zipfile

    import torch

    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            if stream.read(1) == b"\x80":
                return {}  # the format before PyTorch 1.6, which has no list of its tensors
        raise UserError(f"{file} is no whole PyTorch file; fetch it again, or save the model as safetensors")
    try:
        tensors = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is no whole PyTorch file ({first_line(error)}); fetch it again") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is no PyTorch file of plain tensors; fetch it again, or save the model as safetensors"
        ) from None
    if not isinstance(tensors, dict):
        raise UserError(f"{file} holds no tensors by name; save the model with save_pretrained")
    return {
        name: (str(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
