"""Serve checks as runs of the tracking store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import Skipped, UserError
from layerbits.jobs import Tracker, note, refusal
from layerbits.serving.settings import ServeSettings
from layerbits.serving.targets import Target, find_targets
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec

if TYPE_CHECKING:
    from layerbits.serving.job import Checked


def run_checks(settings: ServeSettings, tracking: TrackingSpec, root: Path) -> None:
    """Checks one checkpoint, or several one after the other in runs of their own below one parent.

    Args:
        settings: What to check, and how.
        tracking: Where to log.
        root: The project's folder.

    Raises:
        UserError: There is no such checkpoint, or a check failed.
    """
    tracker = Tracker(tracking, root)
    targets = find_targets(settings, tracker.uri)
    several = len(targets) > 1
    what = "serve checks of" if settings.compare else "speeds of"
    with tracker.parent(f"{what} {settings.source}", "serve_checks") if several else nullcontext():
        _check_each(targets, settings, tracker, root)


def _check_each(targets: Sequence[Target], settings: ServeSettings, tracker: Tracker, root: Path) -> None:
    from layerbits.serving.job import Checker

    checker = Checker(settings, root)
    what = "serve check of" if settings.compare else "speed of"
    failed = []
    for target in targets:
        kept: list[Checked] = []
        try:
            with tracker.run(f"{what} {target.title}", "serve_check", system_metrics=True) as run:
                try:
                    made = _made(checker.check(target, kept.append))
                except (KeyboardInterrupt, SystemExit):
                    if kept:
                        run.log(_stopped(_made(kept[-1])))
                    raise
                run.log(made)
        except Skipped as skipped:
            print(f"skipped: {skipped}", flush=True)
        except UserError as error:
            if len(targets) == 1:
                raise
            print(f"\n{target.folder.name} FAILED: {error}", flush=True)
            failed.append(error)
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} checks failed: {failed[0]}")


def _made(checked: Checked) -> Made:
    """A check as it is logged, with its checkpoint's model card; prints its report."""
    from layerbits.serving.card import write_served

    done = checked.done
    print(f"\n{done.markdown()}\nserve check: {checked.folder}", flush=True)
    if (card := write_served(done)) is not None:
        shutil.copyfile(card, checked.folder / card.name)
        print(f"model card: {card}", flush=True)
    tags = {**checked.tags, **note(done.markdown())}
    made = Made(checked.folder, done.metrics, checked.parameters, tags, refusal(done.require))
    return replace(made, data=checked.data, measured=checked.measured)


def _stopped(made: Made) -> Made:
    """What was measured before somebody stopped the rest: metrics of its model, which is not searched by them."""
    return replace(made, failure=None, measured=tuple(replace(one, values={}, tags={}) for one in made.measured))
