"""Scores a grid of quant pairs × granularities × dataset sizes; one parent run, a child per cell.

python experiments/grid.py 'quant_pairs="wfp8_afp8,wint8_aint8"' quant_granularities=default
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from layerbits import entry
from layerbits.config import Settings
from layerbits.grid import Cell, CellOutcome, Log, axis, cells, run_grid, run_names, summary
from layerbits.results.result import SensitivityResult

if TYPE_CHECKING:
    from layerbits.tracking import RunSession

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def grid(config: dict[str, Any]) -> None:
    """Runs the cells, logs each and prints the table."""
    axes = {key: config.pop(key) for key in ("quant_pairs", "quant_granularities", "dataset_sizes", "force")}
    settings = Settings.from_config(config)
    wanted = cells(
        axis(axes["quant_pairs"], CONFIGS / "quant_pair"),
        axis(axes["quant_granularities"], CONFIGS / "quant_granularity"),
        axis(axes["dataset_sizes"], CONFIGS, known_sizes=True),
    )
    if not settings.tracking.enabled:
        nothing = Log(lambda _id: None, lambda _cell, _result, folder: str(folder), lambda *_: "")
        _show(_run(wanted, settings, nothing, axes["force"]))
        return
    from layerbits import tracking

    tracking.open_store(settings.tracking.uri, ROOT)
    experiment = settings.tracking.experiment
    name = settings.tracking.run_name or f"grid {settings.model.name}"
    names = run_names(wanted, settings.model.name)
    with tracking.parent_run(name, experiment) as parent:
        log = Log(
            lambda cell: tracking.finished_run(cell, parent.experiment_id),
            lambda cell, result, folder: _log_result(names[cell], result, folder, experiment),
            lambda cell, outcome, reason, alias: _log_cell(names[cell], cell, settings, outcome, reason, alias),
        )
        outcomes = _run(wanted, settings, log, axes["force"])
        _show(outcomes)
        _log_summary(parent, outcomes)


def _run(wanted: list[Cell], settings: Settings, log: Log, force: bool) -> list[CellOutcome]:
    with tqdm(total=len(wanted), desc="cells", unit="cell") as bar:
        return run_grid(wanted, settings, CONFIGS, log, ROOT, force, bar.update)


def _log_result(name: str, result: SensitivityResult, folder: Path, experiment: str) -> str:
    from layerbits import tracking

    with tracking.start_run(name, experiment, system_metrics=False) as session:
        tracking.log_result(session, result, folder)
    return session.run_id


def _log_cell(name: str, cell: Cell, settings: Settings, outcome: str, reason: str, alias_of: str) -> str:
    from layerbits import tracking

    return tracking.log_cell(
        name,
        outcome,
        reason,
        params={
            "eff.model": settings.model.name,
            "eff.quant_pair": cell.quant_pair,
            "eff.granularity": cell.granularity,
            "eff.dataset_size": cell.dataset_size,
        },
        alias_of=alias_of or None,
    )


def _log_summary(parent: RunSession, outcomes: list[CellOutcome]) -> None:
    from layerbits import tracking

    table = summary(outcomes)
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "summary.csv", index=False)
        table.to_json(Path(folder) / "summary.json", orient="records", indent=1)
        table.to_html(Path(folder) / "summary.html", index=False, na_rep="")
        tracking.log_folder(parent, Path(folder), "grid")


def _show(outcomes: list[CellOutcome]) -> None:
    table = summary(outcomes).drop(columns=["reason", "run_id"])
    print(f"\n{table.to_string(index=False, na_rep='-', float_format=lambda v: f'{v:.4g}')}")
    for outcome in outcomes:
        if outcome.reason and outcome.status != "ok":
            print(f"{outcome.cell.candidate} {outcome.cell.dataset_size} {outcome.status}: {outcome.reason}")
        if outcome.status == "failed":  # a queue goes by the exit status
            entry.failed.append(outcome.reason)


if __name__ == "__main__":
    entry.start(grid, CONFIGS, "grid")
    sys.exit(entry.USER_ERROR_STATUS if entry.failed else 0)
