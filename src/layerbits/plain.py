"""Names for plain data: what JSON and YAML hold. Its values are checked where they are read, not by their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""An object as ``json.loads`` gives it, or one that is built to be written; its values are read by key."""

JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, only read."""

Composed: TypeAlias = JsonMapping
"""A configuration as Hydra composed it, resolved to plain data."""
