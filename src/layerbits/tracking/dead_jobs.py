"""Jobs of a queue that ended without a word: each becomes a failed child of the sweep."""

from __future__ import annotations

import os

from layerbits.tracking.log import log_cell
from layerbits.tracking.queue import JOB_TAG
from layerbits.tracking.session import PARENT_VARIABLE


def record_dead(job: str, name: str, reason: str) -> None:
    """Makes a failed child of a job that ended without closing its run, or before it opened one.

    Args:
        job: Its number.
        name: Name of a child that has to be made.
        reason: One line.

    Raises:
        UserError: The store failed.
    """
    import mlflow
    from mlflow.entities import RunTag

    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    client = mlflow.MlflowClient()
    where = client.get_run(parent).info.experiment_id
    for run in client.search_runs([where], f"tags.mlflow.parentRunId = '{parent}'", max_results=10_000):
        if run.data.tags.get(JOB_TAG, "").endswith(f" {job}"):
            if run.info.status == "RUNNING" or run.data.tags.get("outcome") == "killed":
                client.log_batch(run.info.run_id, tags=[RunTag("outcome", "failed"), RunTag("reason", reason)])
                client.set_terminated(run.info.run_id, "FAILED")
            return
    log_cell(name, "failed", reason)
