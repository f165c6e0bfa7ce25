"""Files and folders that a reader sees whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from layerbits.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing under a temporary name beside ``path``, renamed to it when all was written.

    Makes the folder where it is missing; after an exception nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name beside ``final``, renamed to it when all was written.

    What stood at ``final`` is replaced; after an exception nothing is left of the new folder.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final} ({error.strerror}); free space or set output_root") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def dated(root: Path, name: str) -> Path:
    """A folder of its own for one result below ``tmp`` of the output root, named by what it is and the time."""
    name = name.replace(" ", "_").replace("/", "-")
    return root / "tmp" / f"{name}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S-%f')}"


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that a reader sees the whole file or none."""
    text = json.dumps(data, indent=2, allow_nan=False)
    with atomic(path) as file:
        file.write(f"{text}\n".encode())
