"""Files and folders that a reader sees whole or not at all, whenever the process ends.

What is being written lies under a hidden name beside its place, locked for as long as its process lives. So what a
killed process left is told from what another one is writing, and is removed by the next write to the same folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from layerbits.errors import UserError, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOTDIR)
# What libraries make of such an error: PyTorch's writer, which does not say why, and safetensors'.
_WORDS = re.compile("PytorchStreamWriter failed|No space left on device|Disk quota exceeded|Read-only file system")


@contextmanager
def atomic(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """A file open for writing under a temporary name beside ``path``, renamed to it when all was written.

    Makes the folder where it is missing; after an exception nothing is left.

    Args:
        path: Of the file.
        replace: Whether it takes the place of one that is there by then.

    Raises:
        FileExistsError: There is one, and it stays.
    """
    handle, name = _temporary(path)
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            yield file
        os.chmod(name, 0o644)
        if replace:
            os.replace(name, path)
        else:
            _keep(name, path)
    finally:
        name.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def scratch_folder(final: Path) -> Iterator[Path]:
    """A new folder under a temporary name beside ``final``, gone afterwards unless it was renamed."""
    handle, folder = _temporary(final, folder=True)
    try:
        os.chmod(folder, 0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextmanager
def whole_folder(final: Path, advice: str = "free space or set output_root") -> Iterator[Path]:
    """A folder to fill under a temporary name beside ``final``, renamed to it when all was written.

    What stood at ``final`` is replaced; after an exception nothing is left of the new folder.

    Args:
        final: Its place.
        advice: What to do where it cannot be written.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    try:
        with scratch_folder(final) as partial:
            yield partial
            _rename(partial, final)
    except Exception as error:
        reason = why_unwritable(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {final} ({reason}); {advice}") from None


@contextmanager
def optional_part(part: str) -> Iterator[None]:
    """Writes a figure or a page beside a result; where it cannot be made, the result goes on without it.

    Args:
        part: What the warning on stderr names.

    Raises:
        Exception: It could be made but not written, as on a full disk: then the result cannot be either.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or why_unwritable(error) is not None:
            raise
        print(f"warning: {part} is left out ({type(error).__name__}: {first_line(error)})", file=sys.stderr, flush=True)


def why_unwritable(error: BaseException) -> str | None:
    """What keeps a file from being written, in a few words; ``None`` where an exception says something else."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _UNWRITABLE else None
    match = _WORDS.search(str(error))
    if match is None:
        return None
    return "the file cannot be written" if match[0].startswith("Pytorch") else match[0]


def why_no_file(path: Path) -> str | None:
    """What will keep a file from being written once there is something to write; ``None`` where nothing is seen."""
    if path.is_dir():
        return os.strerror(errno.EISDIR)
    try:
        with scratch_folder(path):
            return None
    except OSError as error:
        return error.strerror


def dated(root: Path, name: str) -> Path:
    """A folder of its own for one result below ``tmp`` of the output root, named by what it is and the time."""
    name = name.replace(" ", "_").replace("/", "-")
    return root / "tmp" / f"{name}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S-%f')}"


def write_json(path: Path, data: object) -> None:
    """Writes JSON so that a reader sees the whole file or none."""
    text = json.dumps(data, indent=2, allow_nan=False)
    with atomic(path) as file:
        file.write(f"{text}\n".encode())


def _keep(name: Path, path: Path) -> None:
    """Puts a file in its place unless there is one."""
    try:
        os.link(name, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(name, path)  # a file system without links


def _rename(partial: Path, final: Path) -> None:
    """Puts a folder in its place; what is there goes to where the next write removes it."""
    while True:
        try:
            partial.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = final.with_name(f".{final.name}.{uuid.uuid4().hex}{_suffix()}")
        with suppress(FileNotFoundError):  # another process was faster
            final.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _temporary(final: Path, folder: bool = False) -> tuple[int, Path]:
    """A new file or folder beside ``final``, open and locked."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file is in the place of the folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final.parent)) from None
    _sweep(final.parent)
    while True:
        prefix = f".{final.name}."
        if folder:
            name = tempfile.mkdtemp(_suffix(), prefix, final.parent)
            handle = os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(_suffix(), prefix, final.parent)
        if _lock(handle) is not False and os.path.exists(name):
            return handle, Path(name)
        os.close(handle)  # a sweep of another process got between


def _sweep(folder: Path) -> None:
    """Removes what killed processes of this machine left in a folder."""
    for path in folder.glob(f".*{_suffix()}"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _suffix() -> str:
    """End of the temporary names of this machine: locks of another need not be seen here."""
    return f".{socket.gethostname()}.partial"


def _lock(handle: int) -> bool | None:
    """Whether nobody else holds the lock, which is then ours until it is closed; ``None`` where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
