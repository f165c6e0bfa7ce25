"""Checks whether an exported checkpoint is sound, and whether vLLM serves it as PyTorch computes it.

python experiments/serve_check.py run_id=RUN_ID
python experiments/serve_check.py checkpoint=outputs/export/FOLDER/fp8_autoquant_full tracking=none
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.errors import Skipped
from layerbits.serving.job import ServeSettings, check
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def serve_check(config: dict[str, Any]) -> None:
    """Checks a checkpoint, writes and logs the result; without vLLM the run ends as skipped."""
    settings = ServeSettings.from_config(config)
    track = TrackingSpec(**config["tracking"])
    try:
        if not track.enabled:
            check(settings, track.uri).done.require()
            return
        from layerbits import tracking

        uri = tracking.open_store(track.uri, ROOT)
        name = track.run_name or f"serve check of {settings.source}"
        tags = {"layerbits.kind": "serve_check"}
        with tracking.start_run(name, track.experiment, tags=tags, system_metrics=track.system_metrics) as session:
            made = check(settings, uri)
            note = entry.note(made.done.markdown())
            tracking.log_derived(session, made.folder, made.done.metrics, made.parameters, {**made.tags, **note})
            made.done.require()
    except Skipped as skipped:
        print(f"skipped: {skipped}")


if __name__ == "__main__":
    entry.start(serve_check, CONFIGS, "serve_check")
