"""Exported checkpoints, checked and served."""

from __future__ import annotations

from pathlib import Path

from layerbits.plain import Composed
from layerbits.serving.runs import run_checks
from layerbits.serving.settings import ServeSettings
from layerbits.tracking.settings import TrackingSpec


def serve_check(config: Composed, root: Path) -> None:
    """Checks one checkpoint, or several one after the other in runs of their own below one parent."""
    run_checks(ServeSettings.from_config(config), TrackingSpec.from_config(config), root)
