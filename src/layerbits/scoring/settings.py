"""What a model is measured in and where, as users say it; checked without torch."""

from __future__ import annotations

from collections.abc import Sequence

from layerbits.errors import UserError

DTYPES = ("auto", "float32", "model")
DEVICES = ("auto", "cpu", "cuda")


def check_dtype(wanted: str) -> str:
    """A ``dtype`` setting.

    Raises:
        UserError: It is not one of :data:`DTYPES`.
    """
    if wanted not in DTYPES:
        raise UserError(f"dtype={wanted} is not known; use one of {', '.join(DTYPES)}")
    return wanted


def check_device(wanted: object, known: Sequence[str] = DEVICES) -> str:
    """A ``device`` setting; whether there is a GPU is not looked at.

    Args:
        wanted: The setting.
        known: What it may be.

    Raises:
        UserError: It is something else.
    """
    if wanted not in known:
        raise UserError(f"device={wanted} is not known; use one of {', '.join(known)}")
    return str(wanted)
