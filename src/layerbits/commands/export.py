"""Schemes as checkpoints that runtimes load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerbits.export.settings import ExportSettings
from layerbits.history.scheme_inputs import requested_schemes
from layerbits.jobs import Tracker
from layerbits.plain import Composed
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.scheme import Scheme
from layerbits.serving.environment import warn_of_version
from layerbits.serving.find_costs import measuring
from layerbits.tracking.settings import TrackingSpec


def export(config: Composed, root: Path) -> None:
    """Makes or reads the schemes, and exports one after the other, each in a run of its own below one parent."""
    wanted = SchemeRequest.from_config(config, root / "configs" / "scheme")
    settings = ExportSettings.from_config(config)
    warn_of_version(str(config["target"]), root)
    tracker = Tracker(TrackingSpec.from_config(config), root)
    with tracker.parent(f"export of {wanted.source_name}", "exports"):
        schemes = requested_schemes(wanted, tracker.uri, measuring(tracker.uri, root, str(config["target"])))
        settings.check_registered(schemes[0].model.name if schemes else "")
        _export(schemes, settings, tracker, root)


def _export(schemes: Sequence[Scheme], settings: ExportSettings, tracker: Tracker, root: Path) -> None:
    from layerbits.export.job import run_exports
    from layerbits.export.log import ExportLog

    run_exports(schemes, settings, ExportLog(settings, tracker, root))
