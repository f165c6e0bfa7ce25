"""Checks whether exported checkpoints are sound, and whether vLLM serves them as they were scored.

python experiments/serve_check.py run_id=RUN_ID
python experiments/serve_check.py checkpoint=outputs/export/FOLDER/fp8_autoquant_full tracking=none
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.errors import Skipped, UserError
from layerbits.serving.job import Checker, ServeSettings, Target, find_targets
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def serve_check(config: dict[str, Any]) -> None:
    """Checks one checkpoint, or several one after the other in runs of their own below one parent."""
    settings = ServeSettings.from_config(config)
    track = TrackingSpec.from_config(config)
    checker = Checker(settings, ROOT)
    if not track.enabled:
        _each(find_targets(settings, track.uri), lambda target: checker.check(target).done.require())
        return
    from layerbits import tracking

    uri = tracking.open_store(track.uri, ROOT)
    targets = find_targets(settings, uri)
    if len(targets) == 1:
        _each(targets, lambda target: _tracked(checker, target, track))
        return
    name = track.run_name or f"serve checks of {settings.source}"
    with tracking.parent_run(name, track.experiment, tags={"layerbits.kind": "serve_checks"}):
        _each(targets, lambda target: _tracked(checker, target, track))


def _each(targets: list[Target], check: Callable[[Target], None]) -> None:
    failed = []
    for target in targets:
        try:
            check(target)
        except Skipped as skipped:
            print(f"skipped: {skipped}", flush=True)
        except UserError as error:
            if len(targets) == 1:
                raise
            print(f"\n{target.folder.name} FAILED: {error}", flush=True)
            failed.append(error)
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} checks failed: {failed[0]}")


def _tracked(checker: Checker, target: Target, track: TrackingSpec) -> None:
    from layerbits import tracking

    name = track.run_name or f"serve check of {target.folder.name}"
    tags = {"layerbits.kind": "serve_check"}
    with tracking.start_run(name, track.experiment, tags=tags, system_metrics=track.system_metrics) as session:
        made = checker.check(target)
        note = entry.note(made.done.markdown())
        tracking.log_derived(session, made.folder, made.done.metrics, made.parameters, {**made.tags, **note})
        made.done.require()


if __name__ == "__main__":
    entry.start(serve_check, CONFIGS, "serve_check")
