"""Logs the results of earlier tools as runs; what was imported before stays as it is.

python experiments/import_results.py path=FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from layerbits import entry, importing
from layerbits.errors import UserError
from layerbits.paths import user_path
from layerbits.results.result import SensitivityResult
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent


def import_results(config: dict[str, Any]) -> None:
    """Reads the files, writes a result for each format of each, and logs those that no run has yet."""
    if config["path"] == "none":
        raise UserError("no path is given; set path to a quant manifest, a per-layer report, or a folder of them")
    path, output = (user_path(config[key]) for key in ("path", "output_root"))
    model = "" if config["model_name"] in (None, "none") else str(config["model_name"])
    found: list[tuple[SensitivityResult, Path]] = []
    lines: list[str] = []
    states = importing.states(path)
    for file in states:
        try:
            state = importing.read_state(file)
            found += [(r, importing.write(r, state, output)) for r in importing.state_results(state, model)]
        except UserError as error:
            lines.append(str(error))
    tables: list[importing.Table] = []
    if not states or path.is_dir():
        try:
            tables, more = importing.collect(path)
            lines += more
        except UserError:
            if not states:
                raise
    for table in tables:
        try:
            found += [(result, importing.write(result, table, output)) for result in importing.results(table)]
        except UserError as error:
            lines.append(str(error))
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    if not found:
        raise UserError(f"nothing to import: {lines[0]}")
    track = TrackingSpec.from_config(config)
    if not track.enabled:
        print("\n".join(f"result: {folder}" for _, folder in found))
        return
    from layerbits import tracking

    tracking.open_store(track.uri, ROOT)
    name = track.run_name or f"import {path.name}"
    with tracking.start_run(name, track.experiment, tags={"layerbits.kind": "import"}, system_metrics=False) as session:
        rows = [_log(result, folder, session.run_id) for result, folder in found]
        _summary(session, rows, output)


def _log(result: SensitivityResult, folder: Path, parent: str) -> dict[str, Any]:
    from layerbits import tracking

    run_id, state = tracking.logged_run(folder), "present"
    if run_id is None:
        with tracking.start_run(result.run_name, parent_run_id=parent, system_metrics=False) as session:
            tracking.log_result(session, result, folder)
        run_id, state = session.run_id, "imported"
    score, most = result.total("scores"), result.rows()[0]["layer"]
    facts = {"groups": len(result.groups), "score_sum": score, "most_sensitive": most, "run_id": run_id}
    return {"run": result.run_name, "file": result.tags["import.file"], "state": state, **facts}


def _summary(session: Any, rows: list[dict[str, Any]], output: Path) -> None:
    from layerbits import tracking

    table = pd.DataFrame(rows)
    print(f"\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
    folder = output / "tmp" / f"import-{session.run_id}"
    (folder / "import").mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "import" / "summary.csv", index=False)
    counts = table["state"].value_counts()
    tracking.log_derived(session, folder, {f"import/{k}": int(counts.get(k, 0)) for k in ("imported", "present")})


if __name__ == "__main__":
    entry.start(import_results, ROOT / "configs", "import_run")
