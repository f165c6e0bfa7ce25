"""What is counted of schemes beside bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerbits.schemes.cost_table import Step
from layerbits.schemes.sizes import Load

if TYPE_CHECKING:
    from layerbits.schemes.source import Source


@dataclass(frozen=True)
class Timed:
    """Which milliseconds are counted.

    Attributes:
        step: The step.
        costs: File or run of the table of costs.
    """

    step: Step
    costs: str


@dataclass(frozen=True)
class Counted:
    """What is to be found of a source's schemes.

    Attributes:
        load: Bytes under this load; ``None`` = no budget counts them.
        timed: Seconds of a step; ``None`` = no table of costs is named.
    """

    load: Load | None = None
    timed: Timed | None = None


Measure = Callable[["Source", Counted], "Source"]
"""Gives a source the bytes and seconds of its schemes."""
