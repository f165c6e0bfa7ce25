"""Exported checkpoints, checked and served."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from layerbits.errors import Skipped, UserError
from layerbits.jobs import Tracker, note, refusal
from layerbits.plain import Composed
from layerbits.serving.settings import ServeSettings
from layerbits.serving.targets import Target, find_targets
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def serve_check(config: Composed, root: Path) -> None:
    """Checks one checkpoint, or several one after the other in runs of their own below one parent."""
    settings = ServeSettings.from_config(config)
    tracker = Tracker(TrackingSpec.from_config(config), root)
    targets = find_targets(settings, tracker.uri)
    several = len(targets) > 1
    with tracker.parent(f"serve checks of {settings.source}", "serve_checks") if several else nullcontext():
        _check_each(targets, settings, tracker, root)


def _check_each(targets: Sequence[Target], settings: ServeSettings, tracker: Tracker, root: Path) -> None:
    from layerbits.serving.job import Checker

    checker = Checker(settings, root)
    failed = []
    for target in targets:
        try:
            with tracker.run(f"serve check of {target.folder.name}", "serve_check", system_metrics=True) as run:
                checked = checker.check(target)
                done = checked.done
                tags = {**checked.tags, **note(done.markdown())}
                made = Made(checked.folder, done.metrics, checked.parameters, tags, refusal(done.require))
                run.log(replace(made, data=checked.data, measured=checked.measured))
        except Skipped as skipped:
            print(f"skipped: {skipped}", flush=True)
        except UserError as error:
            if len(targets) == 1:
                raise
            print(f"\n{target.folder.name} FAILED: {error}", flush=True)
            failed.append(error)
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} checks failed: {failed[0]}")
