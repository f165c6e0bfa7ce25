"""A grid of quant pairs × granularities × dataset sizes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from layerbits import tracking
from layerbits.atomic import dated
from layerbits.config import Settings
from layerbits.errors import Skipped, UserError
from layerbits.export.target import as_served, find_target
from layerbits.failures import failed
from layerbits.grid import Cell, CellOutcome, axis, candidate_of, cells, run_grid, run_names, summary
from layerbits.jobs import JobRun, Tracker
from layerbits.plain import Composed, flag
from layerbits.results.result import SensitivityResult
from layerbits.serving.environment import warn_of_version
from layerbits.stages.inputs import check_inputs
from layerbits.tracking.made import Made


def grid(config: Composed, root: Path) -> None:
    """Runs the cells, logs each and prints the table."""
    force = flag("force", config["force"])
    axes = ("quant_pairs", "quant_granularities", "dataset_sizes", "force")
    settings = Settings.from_config({key: value for key, value in config.items() if key not in axes})
    configs = root / "configs"
    wanted = cells(
        axis(config["quant_pairs"], configs / "quant_pair"),
        axis(config["quant_granularities"], configs / "quant_granularity"),
        axis(config["dataset_sizes"], configs, known_sizes=True),
    )
    warn_of_version(str(config["target"]), root)
    say_served(wanted, settings, configs, find_target(str(config["target"])))
    for size in dict.fromkeys(cell.dataset_size for cell in wanted):
        check_inputs(replace(settings, dataset=replace(settings.dataset, size=size)))
    tracker = Tracker(settings.tracking, root)
    with (
        suppress(Skipped),
        tracker.parent(f"grid {settings.model.name}") as parent,
        tqdm(total=len(wanted), desc="cells", unit="cell") as bar,
    ):
        log = CellLog(tracker, parent, settings, run_names(wanted, settings.model.name))
        outcomes = run_grid(wanted, settings, configs, log, root, force, bar.update)
        bar.close()
        _show(outcomes)
        if tracker.enabled:
            parent.log(_summary(outcomes, settings))
        found = {outcome.status for outcome in outcomes}
        if "skipped" in found and not found & {"ok", "failed"}:
            raise Skipped("every cell that can be scored is finished already")
    # a queue goes by the exit status
    failed.extend(outcome.reason for outcome in outcomes if outcome.status == "failed")


def say_served(wanted: Sequence[Cell], settings: Settings, configs: Path, target: str | None) -> None:
    """Says what the GPU that will serve computes of the candidates; one that does not exist says so in its turn."""
    said: dict[str, None] = {}
    for cell in wanted if target is not None else ():
        with suppress(UserError):
            said |= dict.fromkeys(as_served([candidate_of(cell, settings, configs).info], target))
    for line in said:
        print(f"warning: {line}", file=sys.stderr, flush=True)


class CellLog:
    """A run for each cell of a grid, below the grid's own."""

    def __init__(self, tracker: Tracker, parent: JobRun, settings: Settings, names: Mapping[Cell, str]) -> None:
        self._tracker = tracker
        self._parent = parent
        self._model = settings.model.name
        self._names = names

    def find(self, cell: str) -> str | None:
        """Id of a finished run of a cell, given as its digest."""
        session = self._parent.session
        return None if session is None else tracking.finished_run(cell, session.experiment_id)

    def result(self, cell: Cell, result: SensitivityResult, folder: Path) -> str:
        """Logs a cell's result; its run id, or the folder where nothing is tracked."""
        with self._tracker.run(self._names[cell]) as run:
            run.log_result(result, folder)
        return run.run_id or str(folder)

    def without_result(self, cell: Cell, outcome: str, reason: str, alias_of: str) -> str:
        """Records a cell that has no result of its own; its run id."""
        if not self._tracker.enabled:
            return ""
        params = {
            "eff.model": self._model,
            "eff.quant_pair": cell.quant_pair,
            "eff.granularity": cell.granularity,
            "eff.dataset_size": cell.dataset_size,
        }
        return tracking.log_cell(self._names[cell], outcome, reason, params=params, alias_of=alias_of or None)


def _summary(outcomes: Sequence[CellOutcome], settings: Settings) -> Made:
    """The table of a grid in a folder of its own."""
    folder = dated(settings.output_root, f"grid_{settings.model.name}")
    table = summary(outcomes)
    (folder / "grid").mkdir(parents=True)
    table.to_csv(folder / "grid" / "summary.csv", index=False)
    table.to_json(folder / "grid" / "summary.json", orient="records", indent=1)
    table.to_html(folder / "grid" / "summary.html", index=False, na_rep="", encoding="utf-8")
    return Made(folder)


def _show(outcomes: Sequence[CellOutcome]) -> None:
    table = summary(outcomes).drop(columns=["reason", "run_id"])
    print(f"\n{table.to_string(index=False, na_rep='-', float_format=lambda v: f'{v:.4g}')}")
    for outcome in outcomes:
        if outcome.reason and outcome.status != "ok":
            print(f"{outcome.cell.candidate} {outcome.cell.dataset_size} {outcome.status}: {outcome.reason}")
