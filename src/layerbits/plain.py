"""Plain data, what JSON and YAML hold: names for its types, and the numbers that JSON lacks.

Its values are checked where they are read, not by their types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from layerbits.errors import UserError

JsonObject: TypeAlias = dict[str, Any]
"""An object as ``json.loads`` gives it, or one that is built to be written; its values are read by key."""

JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, only read."""

Composed: TypeAlias = JsonMapping
"""A configuration as Hydra composed it, resolved to plain data."""


def unset(value: object) -> bool:
    """Whether a value of a configuration stands for none: left out, empty, ``none`` or ``null``."""
    return value in (None, "", "none", "null")


def flag(key: str, value: object) -> bool:
    """A switch of a configuration: Hydra reads ``true`` and ``false`` as such, and ``no`` or ``off`` as words.

    Args:
        key: What the user calls it.
        value: As it was composed.

    Raises:
        UserError: It is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{key}={value} is not known; use true or false")
    return value


def check_address(key: str, address: str | None) -> None:
    """Checks the address of a server, where one is given.

    Args:
        key: What the user calls it.
        address: As it is written; ``None`` = none.

    Raises:
        UserError: It is none of HTTP.
    """
    if address is None:
        return
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or beyond the last
        usable = False
    if not usable:
        raise UserError(f"{key}={address} is no address; use http://host:port")


def finite(value: object) -> object:
    """Plain data with ``None`` for the numbers that JSON cannot express, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return finite_object(value)
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def finite_object(values: Mapping[str, object]) -> JsonObject:
    """:func:`finite` of an object."""
    return {key: finite(value) for key, value in values.items()}
