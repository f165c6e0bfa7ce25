"""Matplotlib's own defaults, whatever the environment, a ``matplotlibrc`` or a notebook says.

A notebook hands its ``MPLBACKEND`` to every command that it starts, and a ``matplotlibrc`` may ask for LaTeX. Figures
of a result must look the same everywhere, and must not fail for such a setting.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_BACKEND = "MPLBACKEND"


def import_matplotlib() -> None:
    """Imports matplotlib also where ``MPLBACKEND`` names a backend that is not here; keeps one that is."""
    if "matplotlib" in sys.modules:
        return
    named = os.environ.pop(_BACKEND, None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ[_BACKEND] = named
    if named:
        with suppress(ValueError, ImportError):  # no such backend: pyplot is not used here
            matplotlib.rcParams["backend"] = named


@contextmanager
def own_settings() -> Iterator[None]:
    """Matplotlib's defaults meanwhile; the settings of the process come back at the end."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def with_own_settings(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, under :func:`own_settings`."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_settings():
            return draw(*args, **kwargs)

    return drawn
