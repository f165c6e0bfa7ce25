"""A checkpoint folder's revision: a digest of every byte that is loaded from it, weights and code included.

The SHA-256 of a large file is kept in the cache folder under what the file system knows of the file (device, inode,
size, times of its last changes in nanoseconds), so that it is read for its digest once. Any change through the file
system changes the time ``ctime``, which no program can set back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from layerbits.atomic import atomic
from layerbits.cache import cache_dir
from layerbits.errors import UserError

_WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pdparams", ".distcp")
)
"""Suffixes of files that hold numbers: of these, only the weights that are loaded count."""
_NOT_LOADED = (".md", ".png", ".jpg", ".gif", ".pdf")
_LARGE = 1 << 20
"""Bytes from which on a digest is kept."""
_SETTLED = 2.0
"""Seconds after its last change from which on a file's times tell it from the next change: clocks of file systems
tick, some once in two seconds."""
_LONG = 5e9
"""Bytes that take long enough to say so."""


def folder_digest(folder: Path, weights: Sequence[Path]) -> str:
    """The revision of a checkpoint folder.

    Args:
        folder: The folder; what else lies there than weights counts too, but pages and pictures.
        weights: The files that the weights are loaded from.

    Returns:
        ``files-`` and 16 hex digits.

    Raises:
        UserError: A file cannot be read, or changes meanwhile.
    """
    files = sorted({*weights, *_beside(folder)})
    digest = hashlib.sha256()
    for file, of_file in zip(files, _digests(files), strict=True):
        digest.update(f"{file.relative_to(folder)}\0{of_file}\0".encode())
    return f"files-{digest.hexdigest()[:16]}"


def _beside(folder: Path) -> Iterator[Path]:
    """Configuration, tokenizer and code."""
    for file in (*folder.iterdir(), *folder.glob("*/**/*.py")):
        logs = file.name.startswith((".", "events.out.tfevents"))
        if file.is_file() and not logs and file.suffix not in _WEIGHTS and file.suffix not in _NOT_LOADED:
            yield file


def _digests(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file."""
    digests = {file: known for file in files if (known := _known(file)) is not None}
    if left := [file for file in files if file not in digests]:
        with _alone():  # of several processes on a machine one reads, the others find what it kept
            left = [file for file in left if file.stat().st_size < _LARGE or _known(file) is None]
            size = sum(file.stat().st_size for file in left)
            if size >= _LONG:
                print(f"reading {size / 1e9:.1f} GB for their digest, which is kept", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                digests |= zip(left, pool.map(_read, left), strict=True)
    return [digests.get(file) or _known(file) or _read(file) for file in files]


def _read(file: Path) -> str:
    """The SHA-256 of a file; kept where it is large."""
    try:
        before = file.stat()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        after = file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); make it readable") from None
    if _identity(before) != _identity(after):
        raise UserError(f"{file} changes while it is read; wait until it is written")
    settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED
    if after.st_size >= _LARGE and settled:
        with suppress(Exception), atomic(_entry(after)) as entry:  # a cache that cannot be written costs time alone
            entry.write(digest.encode())
    return digest


def _known(file: Path) -> str | None:
    """The digest that was kept of a file, ``None`` where there is none."""
    try:
        text = _entry(file.stat()).read_text()
    except OSError:
        return None
    return text if len(text) == 64 else None


def _entry(stat: os.stat_result) -> Path:
    return cache_dir() / "digests" / hashlib.sha256(repr(_identity(stat)).encode()).hexdigest()[:32]


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextmanager
def _alone() -> Iterator[None]:
    """Waits for other processes that read for digests, where the cache folder can be written."""
    try:
        folder = cache_dir() / "digests"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except (OSError, RuntimeError):  # no home
        yield
        return
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
