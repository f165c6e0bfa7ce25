"""Paths as users write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from layerbits.errors import UserError
from layerbits.plain import unset


def home_path(text: str | os.PathLike[str]) -> Path:
    """The path, ``~`` replaced by the home directory.

    Raises:
        UserError: There is no home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text} needs a home directory and there is none; write the whole path, or set HOME") from None


def user_path(text: str | os.PathLike[str]) -> Path:
    """:func:`home_path` as an absolute path.

    Raises:
        UserError: There is no home directory.
    """
    return home_path(text).absolute()


def named_folder(key: str, value: object) -> Path:
    """A folder of the configuration, as an absolute path; a name that looks like a number is a name.

    Args:
        key: What the user calls it.
        value: As it was composed.

    Raises:
        UserError: It names none, or there is no home directory.
    """
    if unset(value) or not isinstance(value, str | int | float | Path):
        raise UserError(f"{key}={value} names no folder; give one")
    return user_path(str(value))


def output_folder(key: str, value: object) -> Path:
    """:func:`named_folder`, of one that results will be written to.

    Raises:
        UserError: Also where something else is in its place, or no folder can be made there.
    """
    folder = named_folder(key, value)
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise UserError(f"{key}={value} cannot be written ({error.strerror}); name another folder") from None
    if not there.is_dir():
        raise UserError(f"{key}={value} cannot be written: {there} is no folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={value} cannot be written: nothing may be made in {there}; name another folder")
    return folder


def exists(text: str) -> bool:
    """Whether a text is the path of something that is there."""
    try:
        return bool(text) and os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a NUL
        return False


def names_file(reference: str) -> bool:
    """Whether a reference to a result names its file or folder, and not the run that logged it."""
    return exists(reference) or "/" in reference or reference.endswith(".json")


def split_at_commas(text: str) -> list[str]:
    """The parts of a comma-separated list of names or paths; a comma inside a path that exists stays.

    Args:
        text: ``a,b,c``; of several paths that exist, or lie in a folder that does, the longest counts.
    """
    return [part for part in (part.strip() for part in _parts(text.split(","))) if part]


def _parts(pieces: list[str]) -> Iterator[str]:
    while pieces:
        ends = range(len(pieces), 1, -1)
        end = next((end for end in ends if _is_path(",".join(pieces[:end]).strip(), pieces[end - 1])), 1)
        yield ",".join(pieces[:end])
        pieces = pieces[end:]


def _is_path(text: str, last: str) -> bool:
    """Whether a text is a path that exists, or its last comma is in the name of a folder that does."""
    _, slash, below = last.partition("/")
    return exists(text) or (bool(slash) and exists(text.removesuffix(f"/{below.rstrip()}")))
