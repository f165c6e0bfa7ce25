"""Exports schemes as checkpoints, proves each by reading it back, and logs and registers them.

python experiments/export.py run_id=RUN_ID
python experiments/export.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json kv_cache=fp8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.export.job import ExportSettings, run_exports, untracked
from layerbits.schemes import Scheme, load_scheme
from layerbits.schemes.make import make_schemes
from layerbits.schemes.settings import SchemeSettings, listed, source_name
from layerbits.schemes.source import load_scores
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def export(config: dict[str, Any]) -> None:
    """Makes or reads the schemes, and exports one after the other, each in a run of its own below one parent."""
    files = listed(config["scheme_files"])
    made = None if files else SchemeSettings.from_config(config, CONFIGS / "scheme")
    settings = ExportSettings.from_config(config)
    track = TrackingSpec(**config["tracking"])
    if not track.enabled:
        run_exports(_schemes(files, made, track.uri), settings, untracked)
        return
    from layerbits import tracking
    from layerbits.export.log import ExportLog

    uri = tracking.open_store(track.uri, ROOT)
    name = track.run_name or f"export of {source_name(files or listed(config['run_id']))}"
    with tracking.parent_run(name, track.experiment, tags={"layerbits.kind": "exports"}):
        log = ExportLog(settings, track, ROOT)
        run_exports(_schemes(files, made, uri), settings, log)


def _schemes(files: list[str], settings: SchemeSettings | None, uri: str | None) -> list[Scheme]:
    if settings is None:
        return [load_scheme(path) for path in files]
    return make_schemes(settings.specs, load_scores(settings.references, uri))


if __name__ == "__main__":
    keys = ("run_id", "schemes", "controls", "effective_bits", "candidates", "scheme_files")
    entry.start(export, CONFIGS, "export", lists=keys)
