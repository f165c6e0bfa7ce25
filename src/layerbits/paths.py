"""Paths as users write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from layerbits.errors import UserError


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


def exists(text: str) -> bool:
    """Whether a text is the path of something that is there."""
    try:
        return bool(text) and os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a NUL
        return False


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
