"""One sensitivity run, or a recipe."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from layerbits.atomic import optional_part
from layerbits.config import Settings
from layerbits.errors import Unsupported
from layerbits.export.target import as_served, find_target
from layerbits.jobs import Tracker
from layerbits.plain import Composed
from layerbits.serving.environment import warn_of_version
from layerbits.stages.inputs import check_inputs


def sensitivity(config: Composed, root: Path) -> None:
    """Runs one job: check, score, write, log."""
    settings = Settings.from_config(config)
    target = find_target(str(config["target"]))
    if settings.report_only:
        from layerbits.report import rebuild

        print(f"report: {rebuild(Path(settings.report_only), settings.output_root / 'report_only')}")
        return
    check_inputs(settings)
    warn_of_version(str(config["target"]), root)
    if settings.recipe:
        from layerbits.recipes.log import recipe_job

        recipe_job(settings, root, lambda info: as_served([info], target))
    else:
        _score(settings, root, target)


def _score(settings: Settings, root: Path, target: str | None) -> None:
    from layerbits.scoring import distributed

    writes = distributed.rank() == 0  # under torchrun the first process writes and logs, the others only score
    tracker = Tracker(settings.tracking, root) if writes else None  # before torch is imported: it may not answer
    from layerbits import sensitivity as job
    from layerbits.report import note
    from layerbits.stages.run import run

    if tracker is None:
        run(job.plan(settings), root)
        return
    with suppress(Unsupported):  # a sweep has a run that says so
        job.candidate_of(settings)
    with tracker.run(settings.run_name, system_metrics=True) as opened:
        directory, result = job.sensitivity(settings, root, lambda info: as_served([info], target))
        with optional_part("the summary below"):
            print(f"\n{note(result)}")
        print(f"result: {directory}")
        opened.log_result(result, directory)
