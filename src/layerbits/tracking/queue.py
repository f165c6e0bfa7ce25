"""Jobs of a queue (Slurm): which one this process is, and in which state others are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerbits.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


def earlier_run(client: MlflowClient, experiment_id: str) -> str | None:
    """The run that this job had opened before it was requeued."""
    if not restarted():
        return None
    runs = client.search_runs([experiment_id], f"tags.`{JOB_TAG}` = '{own_job()}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


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
    by_job = dict(line.split() for line in done.stdout.splitlines() if line.strip())
    return {job: by_job.get(job, "UNKNOWN") for job in jobs}
