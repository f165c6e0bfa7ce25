"""Safetensors files of a bounded size with their index, as transformers names them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerbits.checkpoint.reader import open_checkpoint
from layerbits.inputs.weights import INDEXES, WEIGHTS

SHARD_BYTES = 5_000_000_000

Tensors = Iterable[tuple[str, torch.Tensor]]


def write_shards(tensors: Tensors, folder: Path) -> None:
    """Writes tensors into a folder without weights, as one file or as shards with an index."""
    _name_files(folder, _save(tensors, folder))


def add_shards(tensors: Tensors, folder: Path) -> None:
    """Writes tensors beside those of a checkpoint, in files of their own; nothing where there are none."""
    files: dict[Path, dict[str, int]] = {}
    for name, entry in open_checkpoint(folder).entries.items():
        files.setdefault(entry.file, {})[name] = entry.stop - entry.start
    if more := _save(tensors, folder):
        _name_files(folder, files | more)


def _save(tensors: Tensors, folder: Path) -> dict[Path, dict[str, int]]:
    """Files with passing names → name and bytes of each tensor in them."""
    files: dict[Path, dict[str, int]] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        file = folder / f"unnamed-{len(files)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        files[file] = {name: tensor.nbytes for name, tensor in shard.items()}
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        flush()
    return files


def _name_files(folder: Path, files: Mapping[Path, Mapping[str, int]]) -> None:
    if len(files) == 1:
        next(iter(files)).rename(folder / WEIGHTS[0])
        return
    where: dict[str, str] = {}
    for file in files:
        file.rename(folder / f"unnamed-{file.name}")  # so that no name is taken that another file still has
    for number, (file, tensors) in enumerate(files.items(), 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"unnamed-{file.name}").rename(folder / name)
        where |= dict.fromkeys(tensors, name)
    total = sum(size for tensors in files.values() for size in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
