"""Results of earlier tools as runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from layerbits import importing, tracking
from layerbits.atomic import dated
from layerbits.errors import UserError
from layerbits.jobs import JobRun, Tracker
from layerbits.paths import named_folder, output_folder
from layerbits.plain import Composed, unset
from layerbits.results.result import SensitivityResult
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def import_results(config: Composed, root: Path) -> None:
    """Reads the files, writes a result for each format of each, and logs those that no run has yet."""
    if unset(config["path"]):
        raise UserError("no path is given; set path to a quant manifest, a per-layer report, or a folder of them")
    path = named_folder("path", config["path"])
    output = output_folder("output_root", config["output_root"])
    model = "" if unset(config["model_name"]) else str(config["model_name"])
    imported, warnings = _read(path, output, model)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    if not imported:
        raise UserError(f"nothing to import: {warnings[0]}")
    tracker = Tracker(TrackingSpec.from_config(config), root)
    if not tracker.enabled:
        print("\n".join(f"result: {folder}" for _, folder in imported))
        return
    with tracker.run(f"import {path.name}", "import") as run:
        table = pd.DataFrame([_log(tracker, run, result, folder) for result, folder in imported])
        print(f"\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
        run.log(_summary(table, output))


def _read(path: Path, output: Path, model: str) -> tuple[list[tuple[SensitivityResult, Path]], list[str]]:
    """The results in a file or folder, each written to a folder of its own, and what could not be read."""
    imported: list[tuple[SensitivityResult, Path]] = []
    warnings: list[str] = []
    states = importing.states(path)
    for file in states:
        try:
            state = importing.read_state(file)
            imported += [(r, importing.write(r, state, output)) for r in importing.state_results(state, model)]
        except UserError as error:
            warnings.append(str(error))
    tables: list[importing.Table] = []
    if not states or path.is_dir():
        try:
            tables, more = importing.collect(path)
            warnings += more
        except UserError:
            if not states:
                raise
    for table in tables:
        try:
            imported += [(result, importing.write(result, table, output)) for result in importing.results(table)]
        except UserError as error:
            warnings.append(str(error))
    return imported, warnings


def _log(tracker: Tracker, parent: JobRun, result: SensitivityResult, folder: Path) -> dict[str, object]:
    run_id, state = tracking.logged_run(folder), "present"
    if run_id is None:
        with tracker.run(result.run_name, parent=parent) as run:
            run.log_result(result, folder)
        run_id, state = run.run_id, "imported"
    score, most = result.total("scores"), result.rows()[0]["layer"]
    facts = {"groups": len(result.groups), "score_sum": score, "most_sensitive": most, "run_id": run_id}
    return {"run": result.run_name, "file": result.tags["import.file"], "state": state, **facts}


def _summary(table: pd.DataFrame, output: Path) -> Made:
    folder = dated(output, "import")
    (folder / "import").mkdir(parents=True)
    table.to_csv(folder / "import" / "summary.csv", index=False)
    counts = table["state"].value_counts()
    return Made(folder, {f"import/{k}": int(counts.get(k, 0)) for k in ("imported", "present")})
