"""Schemes as checkpoints that runtimes load."""

from __future__ import annotations

from pathlib import Path

from layerbits.export.job import ExportSettings, run_exports
from layerbits.export.log import ExportLog, check_registered_name
from layerbits.history.scheme_inputs import requested_schemes
from layerbits.jobs import Tracker
from layerbits.plain import Composed
from layerbits.schemes.request import SchemeRequest
from layerbits.serving.find_costs import measuring
from layerbits.tracking.settings import TrackingSpec


def export(config: Composed, root: Path) -> None:
    """Makes or reads the schemes, and exports one after the other, each in a run of its own below one parent."""
    wanted = SchemeRequest.from_config(config, root / "configs" / "scheme")
    settings = ExportSettings.from_config(config)
    tracker = Tracker(TrackingSpec.from_config(config), root)
    with tracker.parent(f"export of {wanted.source_name}", "exports"):
        schemes = requested_schemes(wanted, tracker.uri, measuring(tracker.uri, root, str(config["target"])))
        check_registered_name(settings, schemes[0].model.name if schemes else "")
        run_exports(schemes, settings, ExportLog(settings, tracker, root))
