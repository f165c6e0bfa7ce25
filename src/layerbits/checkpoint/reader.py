"""Safetensors files read piece by piece, so that a checkpoint larger than memory can be compared.

The layout is the one of https://github.com/huggingface/safetensors#format: eight bytes with the length of a JSON
header, the header, the data. Plain reads instead of a memory map keep the pages out of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from layerbits.errors import UserError
from layerbits.inputs.weights import INDEXES, safetensors_files, weight_map
from layerbits.plain import JsonObject

PIECE = 1 << 20
"""Elements that are read at once."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Entry:
    """One stored tensor; ``start`` and ``stop`` are bytes in ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by name; nothing is read before it is asked for."""

    folder: Path
    entries: Mapping[str, Entry]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """Where a tensor is.

        Raises:
            UserError: There is no such tensor.
        """
        if name not in self.entries:
            raise UserError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete, export it again")
        return self.entries[name]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor, ``[stop - start, ...]``; a scalar as it is.

        Raises:
            UserError: No such tensor, or the file ends early.
        """
        entry = self.entry(name)
        if not entry.shape:
            return self._read(entry, entry.start, entry.stop).reshape(())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        stride = (entry.stop - entry.start) // max(1, entry.shape[0])
        part = self._read(entry, entry.start + start * stride, entry.start + stop * stride)
        return part.reshape(stop - start, *entry.shape[1:])

    def pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """Ranges of rows that are together about :data:`PIECE` elements; each starts at an even row."""
        shape = self.entry(name).shape
        if not shape:
            yield 0, 1
            return
        size = max(2, PIECE // max(1, math.prod(shape[1:])) // 2 * 2)
        for start in range(0, shape[0], size):
            yield start, min(start + size, shape[0])

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and values in the order of the names: how it is sharded does not count."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            for at in range(entry.start, entry.stop, _CHUNK):
                digest.update(_bytes(entry.file, at, min(at + _CHUNK, entry.stop)))
        return digest.hexdigest()

    @staticmethod
    def _read(entry: Entry, start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(_bytes(entry.file, start, stop), dtype=entry.dtype)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a checkpoint's safetensors files and checks that the files are whole.

    Raises:
        UserError: No safetensors files, a shard is missing, or a file is truncated or damaged.
    """
    files = safetensors_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        header = _header(file)
        if twice := next((name for name in header if name in entries), None):
            raise UserError(f"{folder} has {twice} in {entries[twice].file.name} and in {file.name}; export it again")
        entries |= header
    if len(files) > 1 and (missing := sorted(set(weight_map(folder / INDEXES[0])) - set(entries))):
        raise UserError(f"{folder} lacks {missing[0]}, which its index names; fetch or export it again")
    return Checkpoint(folder, entries)


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _truncated(file, f"{size} bytes, its header alone needs {8 + length}")
        header = _json(stream.read(length), file)
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            start, stop = (8 + length + offset for offset in value["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: tensor {name} is not described as safetensors says ({error!r})") from None
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise UserError(
                f"{file}: tensor {name} does not have the bytes of its shape {list(shape)}; export it again"
            )
        if stop > size:
            raise _truncated(file, f"{size} bytes, {name} ends at {stop}")
        entries[name] = Entry(file, dtype, shape, start, stop)
    return entries


def _bytes(file: Path, start: int, stop: int) -> bytearray:
    data = bytearray(stop - start)
    with file.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(data) != len(data):
            raise _truncated(file, f"it ends before byte {stop}")
    return data


def _json(text: bytes, file: Path) -> JsonObject:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: its header is not JSON; fetch or export it again")
    return value


def _truncated(file: Path, detail: str) -> UserError:
    return UserError(f"{file} is truncated ({detail}); fetch or export it again")
