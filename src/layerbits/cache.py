"""The folder where fetched and converted files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from layerbits.errors import UserError
from layerbits.paths import user_path

_SET = "set LAYERBITS_CACHE to a folder that can be written"


def cache_dir() -> Path:
    """The cache folder: ``$LAYERBITS_CACHE``, or ``~/.cache/layerbits``.

    Returns:
        An absolute path; the folder need not exist yet.

    Raises:
        UserError: There is no home directory, as for a container's user.
    """
    try:
        return user_path(os.environ.get("LAYERBITS_CACHE") or "~/.cache/layerbits")
    except UserError:
        raise UserError(f"there is no home directory for the cache; {_SET}") from None


def writable_cache() -> Path:
    """The cache folder, made where it is missing.

    Raises:
        UserError: It cannot be made.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache {folder} cannot be made ({error.strerror}); {_SET}") from None
    return folder
