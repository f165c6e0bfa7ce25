"""The folder where fetched and converted files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: ``$LAYERBITS_CACHE``, or ``~/.cache/layerbits``.

    Returns:
        An absolute path; the folder need not exist yet.
    """
    given = os.environ.get("LAYERBITS_CACHE") or "~/.cache/layerbits"
    return Path(given).expanduser().absolute()
