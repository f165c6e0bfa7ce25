"""Keeps a stopped run KILLED under ``mlflow run``: a process that outlives both.

``mlflow run`` means to leave a run alone that has ended, but MLflow 3.17 looks the status up by its name in a set of
numbers (``projects._maybe_set_run_terminated``), so it writes FAILED over every run whose job exits non-zero.
"""

from __future__ import annotations

import subprocess
import sys
import time

_SECONDS = 20


def keep_killed(run_id: str) -> None:
    """Starts the process that puts KILLED back; it ends within seconds of ``mlflow run``, or after 20 s."""
    subprocess.Popen(
        [sys.executable, "-m", __name__, run_id],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the next Ctrl-C is not for it
    )


def _put_back(run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        info = client.get_run(run_id).info
        if info.status != "KILLED":
            client.set_terminated(run_id, "KILLED", info.end_time)
            return
        time.sleep(0.5)


if __name__ == "__main__":
    _put_back(sys.argv[1])
