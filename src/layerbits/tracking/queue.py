"""Jobs of a queue (Slurm): which one this process is, and what became of those that left no result."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from layerbits.errors import UserError

JOB_TAG = "layerbits.job"
"""Tag of the run that a job of a queue opened first."""

GONE = ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "COMPLETED", "UNKNOWN")
"""States of Slurm that a job does not leave by itself."""


def own_job() -> str | None:
    """Name of the job that this process is, the same after a requeue; ``None`` outside a queue."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if job is None:
        return None
    number = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    return f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {number}"


def restarted() -> bool:
    """Whether the queue has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def earlier_run(client: Any, experiment_id: str) -> str | None:
    """The run that this job had opened before it was requeued."""
    if not restarted():
        return None
    found = client.search_runs([experiment_id], f"tags.`{JOB_TAG}` = '{own_job()}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """Slurm's state of jobs by number (``12`` or ``12_3``); ``UNKNOWN`` where it has forgotten one.

    Raises:
        UserError: Slurm does not answer.
    """
    numbers = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={numbers}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"Slurm does not answer ({error}); the jobs may go on, see squeue") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"Slurm does not answer ({done.stderr.strip()}); the jobs may go on, see squeue")
    found = dict(line.split() for line in done.stdout.splitlines() if line.strip())
    return {job: found.get(job, "UNKNOWN") for job in jobs}


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

    from layerbits.tracking.log import log_cell
    from layerbits.tracking.session import PARENT_VARIABLE

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
