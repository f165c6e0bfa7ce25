"""``layerbits.history`` on a store of many runs, over HTTP: seconds of runs() and scores(), cold and cached.

    python benchmarks/history.py --runs 5000 --out record.json
    python benchmarks/history.py --runs 5000 --store postgresql+psycopg2://user:password@localhost/mlflow
    python benchmarks/history.py --runs 500 --workers 1

Fills the store (empty, or filled by an earlier call) with runs that have what the contract lets a run of a model with
36 blocks leave: 144 groups, 171 metrics, 22 parameters, the tags. Rows go straight into the tables that a search reads;
the history of the metrics, which it does not read, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from layerbits import history
from layerbits.results.assignment import Assignment
from layerbits.results.result import Allocation, CalibrationInfo, CandidateInfo, Group, ModelInfo, SensitivityResult
from layerbits.tracking import contract

PAIRS = ("wfp4_afp8", "wfp4_afp16", "wfp8_afp8", "wfp8_afp16", "wint8_afp16", "wint8_aint8")
MODELS = ("qwen3_vl_4b", "qwen3_8b", "llama3_1b", "smollm2_135m")
GRANULARITIES = ("default", "per-token")
KINDS = ("qkv", "o", "gate_up", "down")
BLOCKS = 36
FIRST = 1_750_000_000_000  # Unix milliseconds of the first run's start
EXPERIMENT = "layerbits"
ROOT = Path(__file__).resolve().parents[1]


def synthetic(index: int, blocks: int = BLOCKS) -> SensitivityResult:
    """The result number ``index``: pair, model and granularity go round, scores are drawn from that number."""
    draw = np.random.default_rng(index)
    pair = PAIRS[index % len(PAIRS)]
    model = MODELS[index // len(PAIRS) % len(MODELS)]
    granularity = GRANULARITIES[index // len(PAIRS) // len(MODELS) % len(GRANULARITIES)]
    groups = tuple(Group(f"B{b:02d}.{k}", b, k, (f"layers.{b}.{k}",), 10_000_000) for b in range(blocks) for k in KINDS)
    weight, activation = pair.split("_")
    info = CandidateInfo(
        pair if granularity == "default" else f"{pair}/{granularity}", pair, granularity, "INT8_WEIGHT_ONLY_CFG",
        weight[1:], activation[1:], {"algorithm": "max"}, f"{index:064x}", 8.25, 8.0,
    )  # fmt: skip
    scores = draw.lognormal(-18, 2, len(groups))
    assignment = Assignment(info.name if flag else None for flag in draw.random(len(groups)) < 0.5)
    return SensitivityResult(
        model=ModelInfo(model, f"org/{model}", "c0ffee" * 6, "Qwen3VLForConditionalGeneration", "bfloat16"),
        calibration=CalibrationInfo(
            "everyday", "small", "d1" * 32, "packed", 512, 8, 128, 128, 128, 128, 65_408, (4088,) * 16, 0.0
        ),
        method="gradient",
        engine="onepass",
        seed=index,
        device="cuda",
        groups=groups,
        candidate=info,
        scores=scores,
        predicted_kl=scores * draw.uniform(1e5, 2e5),
        allocation=Allocation(12.0, assignment, 11.5 + draw.random(), 11.9, float(scores.sum() / 3)),
        provenance={
            f"version.{name}": "1.2.3" for name in ("layerbits", "modelopt", "torch", "transformers", "mlflow")
        },
        seconds={"load": 4.0, "calibrate": 2.0, "score": 9.0, "solve": 0.5},
        memory={"peak_rss_gb": 5.0, "peak_gpu_gb": 40.0},
        tags={"deployable": "true", "fingerprint": f"{index:016x}"},
        created="2026-03-04T05:06:07+00:00",
    )


def fill(uri: str, count: int, artifacts: str) -> None:
    """Makes the store and its runs, a run a minute; a store that has that many is left as it is."""
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun, SqlTag
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import func, insert, select

    store = SqlAlchemyStore(uri, artifacts)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    where = int(experiment.experiment_id if experiment else store.create_experiment(EXPERIMENT))
    with store.engine.begin() as connection:
        there = connection.execute(select(func.count()).select_from(SqlRun)).scalar_one()
        for start in range(there, count, 100):
            runs, metrics, params, tags = [], [], [], []
            for index in range(start, min(start + 100, count)):
                result, run = synthetic(index), uuid.uuid4().hex
                at = FIRST + 60_000 * index
                runs.append(
                    {
                        "run_uuid": run, "name": result.run_name, "source_type": "UNKNOWN", "source_name": "",
                        "entry_point_name": "", "user_id": "bench", "status": "FINISHED", "start_time": at,
                        "end_time": at + 30_000, "source_version": "", "lifecycle_stage": "active",
                        "artifact_uri": f"{artifacts}/{run}", "experiment_id": where,
                    }
                )  # fmt: skip
                latest = {key: (value, step) for key, value, step in contract.metrics(result)}
                metrics += [
                    {"run_uuid": run, "key": k, "value": v, "step": s, "timestamp": at, "is_nan": False}
                    for k, (v, s) in latest.items()
                ]
                params += [{"run_uuid": run, "key": k, "value": v} for k, v in contract.parameters(result).items()]
                facts = {
                    **contract.tags(result),
                    contract.RESULT_ID: f"{index:032x}",
                    "mlflow.runName": result.run_name,
                }
                tags += [{"run_uuid": run, "key": k, "value": v} for k, v in facts.items()]
            for table, rows in ((SqlRun, runs), (SqlLatestMetric, metrics), (SqlParam, params), (SqlTag, tags)):
                connection.execute(insert(table), rows)
    store.engine.dispose()


@contextmanager
def server(uri: str, artifacts: str, workers: int) -> Iterator[str]:
    """``mlflow server`` on the store, set up as by ``deploy/serve``; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", str(workers)]
    command += ["--backend-store-uri", uri, "--artifacts-destination", artifacts]
    site = os.pathsep.join(filter(None, [str(ROOT / "deploy" / "site"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": site}
    env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@dataclass
class Clock:
    """Seconds of each question, time after time: on the wall, and of this process' processor."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, question: str, call: Callable[[], Any]) -> Any:
        """What the call answers."""
        start, busy = time.perf_counter(), time.process_time()
        answer = call()
        self.processor.setdefault(question, []).append(round(time.process_time() - busy, 3))
        self.wall.setdefault(question, []).append(round(time.perf_counter() - start, 3))
        return answer


def warm(url: str) -> None:
    """Some questions to each process of the server, which in real life has answered before."""
    few = {"experimentIds": ["1"], "maxResults": 1}
    query = "query Q($i: MlflowSearchRunsInput!) { mlflowSearchRuns(input: $i) { runs { info { runId } } } }"
    bodies = {
        "/graphql": {"query": query, "variables": {"i": few}, "operationName": "Q"},
        "/api/2.0/mlflow/runs/search": {"experiment_ids": ["1"], "max_results": 1},
    }
    for _ in range(24):  # a connection each; which process takes it is chance
        for path, body in bodies.items():
            json_type = {"Content-Type": "application/json"}
            request = urllib.request.Request(url + path, json.dumps(body).encode(), json_type)
            urllib.request.urlopen(request).close()


def measure(url: str, count: int, repeats: int, everything: bool) -> Clock:
    """Asks with a cache of its own, empty where it says cold."""
    one = {"model": MODELS[1], "pair": PAIRS[4], "tracking_uri": url}
    last = FIRST + 60_000 * max(count - 1000, 0)
    thousand = {"since": datetime.fromtimestamp(last / 1000, UTC).isoformat(), "tracking_uri": url}
    warm(url)
    history.runs(model="nobody", tracking_uri=url)  # imports
    clock = Clock()
    for _ in range(repeats):
        shutil.rmtree(os.environ["LAYERBITS_CACHE"], ignore_errors=True)
        frame = clock("runs of one model and pair, cold", lambda: history.runs(**one))
        again = clock("runs of one model and pair, cached", lambda: history.runs(**one))
        assert again.equals(frame)
        shutil.rmtree(os.environ["LAYERBITS_CACHE"])
        clock("runs of one model, pair and granularity, cold", lambda: history.runs(**one, granularity="default"))
        shutil.rmtree(os.environ["LAYERBITS_CACHE"])
        scores = clock("runs and scores of 1000 runs, cold", lambda: history.scores(history.runs(**thousand)))
        assert len(scores) == len(KINDS) * BLOCKS * min(count, 1000)
        frame = history.runs(**thousand)
        check(scores, frame)
        assert clock("scores of 1000 runs, cached", lambda: history.scores(frame)).equals(scores)  # noqa: B023
    if not everything:
        return clock
    frame = clock("all runs, 1000 cached", lambda: history.runs(tracking_uri=url))
    assert len(frame) == count
    for _ in range(repeats):
        assert clock("all runs, cached", lambda: history.runs(tracking_uri=url)).equals(frame)
        clock("scores of 1000 runs, all cached", lambda: history.scores(frame[:1000]))
    return clock


def check(scores: Any, runs: Any) -> None:
    """The scores of the latest run are those that it was made with, to the last bit."""
    latest = runs.iloc[0]
    made = synthetic(int(latest["seed"]))
    found = scores[scores["run_id"] == latest["run_id"]].set_index("layer")
    layers = [group.key for group in made.groups]
    for name, values in (("score", made.scores), ("predicted_kl", made.predicted_kl)):
        np.testing.assert_array_equal(found.loc[layers, name], values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--store", help="URI of a database; by default a SQLite file that is removed again")
    parser.add_argument("--workers", type=int, default=2, help="processes of the server")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--some", action="store_true", help="do not read all runs, which takes the longest")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAYERBITS_CACHE"] = f"{folder}/cache"
        uri = arguments.store or f"sqlite:///{folder}/mlflow.db"
        fill(uri, arguments.runs, f"{folder}/artifacts")
        with server(uri, f"{folder}/artifacts", arguments.workers) as url:
            clock = measure(url, arguments.runs, arguments.repeats, not arguments.some)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": arguments.runs,
        "store": uri.partition(":")[0],
        "workers": arguments.workers,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # 1 or less where nothing else runs
        "seconds": clock.wall,
        "seconds_of_the_client": clock.processor,
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
