"""Scores the groups of one model under one quant pair at one granularity, and logs the run.

python experiments/sensitivity.py quant_pair=wint8_afp16 dataset.size=medium
python experiments/sensitivity.py recipe=general/auto_quantize/nvfp4_fp8_at_5p4bits
python experiments/sensitivity.py -m quant_pair=wfp8_afp8,wint8_afp16
python experiments/sensitivity.py report_only=outputs/tmp/RUN/manifest.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from layerbits import entry
from layerbits.config import Settings
from layerbits.errors import UserError
from layerbits.results.result import SensitivityResult

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path="../configs", config_name="sensitivity")
def main(config: DictConfig) -> str | None:
    """Composes the configuration and runs it; a failed job of a multirun leaves the others running."""
    multirun = hydra.core.hydra_config.HydraConfig.get().mode.name == "MULTIRUN"
    try:
        sensitivity(Settings.from_config(OmegaConf.to_container(config, resolve=True)))
    except UserError as error:
        if not multirun:
            entry.fail(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        entry.failed.append(str(error))
        return str(error)  # a job of a queue has a process of its own: this tells the one that waits
    return None


def sensitivity(settings: Settings) -> None:
    """Runs one job: check, score, write, log."""
    if settings.report_only:
        from layerbits.report import rebuild

        print(f"report: {rebuild(Path(settings.report_only), settings.output_root / 'report_only')}")
        return
    if settings.recipe:
        from layerbits.recipes.log import recipe_job

        recipe_job(settings, ROOT)
        return
    from layerbits.scoring import distributed
    from layerbits.sensitivity import plan
    from layerbits.stages.run import run

    if distributed.rank() > 0:  # under torchrun the first process writes and logs, the others only score
        run(plan(settings), ROOT)
        return
    if not settings.tracking.enabled:
        _score(settings)
        return
    from layerbits import tracking

    tracking.open_store(settings.tracking.uri, ROOT)
    name = settings.tracking.run_name or settings.run_name
    with tracking.start_run(
        name, settings.tracking.experiment, system_metrics=settings.tracking.system_metrics
    ) as session:
        directory, result = _score(settings)
        tracking.log_result(session, result, directory)


def _score(settings: Settings) -> tuple[Path, SensitivityResult]:
    from layerbits import sensitivity as job
    from layerbits.atomic import optional_part
    from layerbits.report import note

    directory, result = job.sensitivity(settings, ROOT)
    with optional_part("the summary below"):
        print(f"\n{note(result)}")
    print(f"result: {directory}")
    return directory, result


if __name__ == "__main__":
    entry.run(main, ROOT / "configs")
    sys.exit(entry.USER_ERROR_STATUS if entry.failed else 0)
