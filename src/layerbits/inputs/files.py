"""Files of a folder that others made: whether each can be read and is what its name says."""

from __future__ import annotations

import json
import os
from pathlib import Path

from layerbits.errors import UserError
from layerbits.plain import JsonObject

_POINTER = b"version https://git-lfs.github.com/spec"
_PAGES = (b"<!doctype html", b"<html")


def check_file(file: Path) -> None:
    """Checks that a file can be opened and is itself, not something that a download left in its place.

    Raises:
        UserError: A link to nothing, a file that may not be read, a pointer of Git LFS, a web page.
    """
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file} is a link to {os.readlink(file)}, which is not there; fetch the file again")
    try:
        with file.open("rb") as stream:
            start = stream.read(256)
    except OSError as error:
        raise unreadable(file, error) from None
    if start.startswith(_POINTER):
        raise UserError(f"{file} is a pointer of Git LFS, not the file; run `git lfs pull` in {file.parent}")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        raise UserError(f"{file} is a web page (HTML), not the file; its download failed, fetch it again")


def unreadable(path: Path, error: OSError) -> UserError:
    """The line for a file or folder that the system does not let us read."""
    return UserError(f"cannot read {error.filename or path} ({error.strerror}); make it readable for this user")


def read_json(file: Path) -> JsonObject:
    """A JSON file that holds an object.

    Raises:
        UserError: It does not.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return value


def few(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
