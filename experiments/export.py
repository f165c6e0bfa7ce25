"""Exports schemes as checkpoints, proves each by reading it back, and logs and registers them.

python experiments/export.py run_id=RUN_ID
python experiments/export.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json kv_cache=fp8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.export.job import ExportSettings, run_exports, untracked
from layerbits.schemes.request import SchemeRequest
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def export(config: dict[str, Any]) -> None:
    """Makes or reads the schemes, and exports one after the other, each in a run of its own below one parent."""
    wanted = SchemeRequest.from_config(config, CONFIGS / "scheme")
    settings = ExportSettings.from_config(config)
    track = TrackingSpec.from_config(config)
    if not track.enabled:
        run_exports(wanted.schemes(track.uri), settings, untracked)
        return
    from layerbits import tracking
    from layerbits.export.log import ExportLog

    uri = tracking.open_store(track.uri, ROOT)
    name = track.run_name or f"export of {wanted.source_name}"
    with tracking.parent_run(name, track.experiment, tags={"layerbits.kind": "exports"}):
        log = ExportLog(settings, track, ROOT)
        run_exports(wanted.schemes(uri), settings, log)


if __name__ == "__main__":
    entry.start(export, CONFIGS, "export")
