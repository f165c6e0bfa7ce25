"""Where to log, as typed settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackingSpec:
    """The ``tracking`` group of the configuration."""

    enabled: bool
    uri: str | None
    experiment: str
    run_name: str | None
    system_metrics: bool
