"""Ends runs that their own process cannot end: a small process that outlives it.

``mlflow run`` means to leave a run alone that has ended, but MLflow 3.17 looks the status up by its name in a set of
numbers (``projects._maybe_set_run_terminated``), so it writes FAILED over every run whose job exits non-zero. And a
store that is locked, or a server that restarts, takes the end of a run only later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping

_KILLED_SECONDS = 20
_CLOSE_SECONDS = float(os.environ.get("LAYERBITS_CLOSE_SECONDS") or 600)


def keep_killed(tracking_uri: str, run_id: str) -> None:
    """Starts the process that puts KILLED back; it ends within seconds of ``mlflow run``, or after 20 s."""
    _start("put_back", tracking_uri, run_id)


def close_later(tracking_uri: str, run_id: str, status: str, tags: Mapping[str, str]) -> None:
    """Starts the process that ends a run as soon as its store takes that; it gives up after ten minutes."""
    _start("close", tracking_uri, run_id, status, json.dumps(dict(tags)))


def _start(*arguments: str) -> None:
    subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the next Ctrl-C is not for it
    )


def _put_back(tracking_uri: str, run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    deadline = time.monotonic() + _KILLED_SECONDS
    while time.monotonic() < deadline:
        info = client.get_run(run_id).info
        if info.status != "KILLED":
            client.set_terminated(run_id, "KILLED", info.end_time)
            return
        time.sleep(0.5)


def _close(tracking_uri: str, run_id: str, status: str, tags: str) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import RunTag

    client = MlflowClient(tracking_uri)
    ended = int(1000 * time.time())
    deadline = time.monotonic() + _CLOSE_SECONDS
    while time.monotonic() < deadline:
        try:
            if client.get_run(run_id).info.status != "RUNNING":
                return  # pushed meanwhile
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in json.loads(tags).items()])
            client.set_terminated(run_id, status, ended)
            if client.get_run(run_id).data.tags.get("outcome") == "ok":  # pushed between these calls
                client.set_terminated(run_id, "FINISHED", ended)
            return
        except Exception:
            time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "put_back":
        _put_back(*sys.argv[2:])
    else:
        _close(*sys.argv[2:])
