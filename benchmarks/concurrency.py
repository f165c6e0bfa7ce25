"""Many processes that log to one store at once: nothing fails, nothing is missing, and how long a run takes.

    python benchmarks/concurrency.py --processes 4 --runs 25                              # a fresh SQLite store
    python benchmarks/concurrency.py --processes 8 --runs 25 --uri http://127.0.0.1:5000  # a server (docs/server.md)
    python benchmarks/concurrency.py --processes 1 --runs 10 --report --uri http://127.0.0.1:5000  # one run at a time

Each process logs whole runs as ``tracking.log_result`` does: 144 groups with all their metrics, parameters, tags, a
data set, files. Afterwards every value of every run is read back and compared. Exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from history import BLOCKS, synthetic

from layerbits import tracking
from layerbits.atomic import write_json
from layerbits.report import write_report
from layerbits.results.manifest import to_manifest
from layerbits.tracking import contract
from layerbits.tracking.view import ensure_view

EXPERIMENT = "concurrency"
MANIFEST = "manifest.json"


def work(uri: str, folder: Path, blocks: int, report: bool, indices: range) -> list[tuple[str, int, float]]:
    """Logs the results of these numbers, a run each: (run id, number, seconds)."""
    tracking.open_store(uri, folder)
    import mlflow

    done = []
    for index in indices:
        result = synthetic(index, blocks)
        directory = folder / "results" / str(index)
        if report:
            write_report(result, directory)
        else:
            write_json(directory / MANIFEST, to_manifest(result))
        begin = time.perf_counter()
        with redirect_stdout(None), tracking.start_run(f"run {index}", EXPERIMENT, system_metrics=False) as session:
            tracking.log_result(session, result, directory)
        done.append((session.run_id, index, time.perf_counter() - begin))
    if ensure_view(mlflow.MlflowClient(), session.experiment_id) is None:
        raise RuntimeError("the view could not be saved")
    return done


def missing(client: Any, blocks: int, run_id: str, index: int) -> list[str]:
    """What a run lacks of its result, or has otherwise."""
    result = synthetic(index, blocks)
    run = client.get_run(run_id)
    points: dict[str, dict[int, float]] = {}
    for key, value, step in contract.metrics(result):
        points.setdefault(key, {})[step] = value
    lacks = [key for key, steps in points.items() if run.data.metrics.get(key) != steps[max(steps)]]
    for key in (key for key, steps in points.items() if len(steps) > 1):
        history = {metric.step: metric.value for metric in client.get_metric_history(run_id, key)}
        lacks += [f"{key} over the blocks"] if history != points[key] else []
    lacks += [key for key, value in contract.parameters(result).items() if run.data.params.get(key) != value]
    lacks += [key for key, value in contract.tags(result).items() if run.data.tags.get(key) != value]
    with tempfile.TemporaryDirectory() as folder:
        manifest = json.loads(Path(client.download_artifacts(run_id, MANIFEST, folder)).read_text())
    lacks += [MANIFEST] if manifest != json.loads(json.dumps(to_manifest(result))) else []
    lacks += ["its end"] if run.info.status != "FINISHED" else []
    return [f"run {index} lacks {what}" for what in lacks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="tracking URI; by default a SQLite file that is removed again")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--runs", type=int, default=25, help="by each process")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the model, four groups each")
    parser.add_argument("--report", action="store_true", help="with report and figures, drawn before the clock starts")
    parser.add_argument(
        "--start",
        choices=("spawn", "forkserver"),
        default="spawn",
        help="of the processes: each with imports of its own, or from one that has made them (wall time is less)",
    )
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    arguments = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        uri = arguments.uri or f"sqlite:///{folder / 'mlflow.db'}"
        shares = [range(at * arguments.runs, (at + 1) * arguments.runs) for at in range(arguments.processes)]
        begin = time.perf_counter()
        context = multiprocessing.get_context(arguments.start)
        context.set_forkserver_preload(["__main__", "mlflow", "mlflow.store.tracking.sqlalchemy_store"])
        with ProcessPoolExecutor(arguments.processes, context) as pool:
            job = partial(work, uri, folder, arguments.blocks, arguments.report)
            done = [run for runs in pool.map(job, shares) for run in runs]
        wall = time.perf_counter() - begin
        tracking.open_store(uri, folder)
        import mlflow

        client = mlflow.MlflowClient()
        with ThreadPoolExecutor(4) as threads:
            look = partial(missing, client, arguments.blocks)
            lacking = [line for lines in threads.map(lambda run: look(*run[:2]), done) for line in lines]
    seconds = sorted(took for _, _, took in done)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "store": uri.partition(":")[0],
        "processes": arguments.processes,
        "runs": len(done),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "report": arguments.report,
        "metric_values_per_run": len(contract.metrics(synthetic(0, arguments.blocks))),
        "wall_s": round(wall, 1),
        "run_s_median": round(statistics.median(seconds), 2),
        "run_s_max": round(seconds[-1], 2),
        "missing": lacking,
    }
    print(json.dumps(record, indent=1))
    if arguments.out:
        write_json(arguments.out, record)
    sys.exit(bool(lacking))


if __name__ == "__main__":
    main()
