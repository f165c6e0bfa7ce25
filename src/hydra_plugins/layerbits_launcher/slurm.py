"""hydra-submitit-launcher's Slurm launcher, watched: a sweep ends when all of its jobs did, however they ended.

The launcher that it extends gives up at the first job that fails, which would close the parent run over jobs that still
run, and asks ``sacct`` for states, which a cluster without accounting does not have.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from layerbits import entry
from layerbits.errors import UserError
from layerbits.failures import failed

if TYPE_CHECKING:
    from submitit import Job

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:  # not installed: entry.check_launcher says so where it is asked for
    SlurmLauncher = None

_POLL_SECONDS = 2.0
_LATE_SECONDS = 30.0  # a result may reach this host's view of the shared disk after the end of its job

if SlurmLauncher is not None:
    _CONF = dataclasses.replace(
        SlurmQueueConf(),
        _target_="hydra_plugins.layerbits_launcher.slurm.WatchedSlurmLauncher",
        timeout_min=240,
        cpus_per_task=4,
        gpus_per_node=1,
        array_parallelism=16,
        max_num_timeout=8,  # a pass goes on from its last finished step
    )
    # entry.start asks for this where the command line says submitit_slurm
    ConfigStore.instance().store("watched_slurm", _CONF, group="hydra/launcher", provider="layerbits")

    class WatchedSlurmLauncher(SlurmLauncher):  # type: ignore[misc, valid-type]
        """Submits the jobs of a sweep as one array and waits for each."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            """Runs a batch of jobs; those that fail are failed children of the parent run.

            Args:
                job_overrides: Of each job.
                initial_job_idx: Number of the first.
            """
            from layerbits.tracking.multirun import end_parent

            try:
                jobs = self._submit(job_overrides, initial_job_idx)
            except UserError as error:
                end_parent(error)
                entry.fail(error)
            names = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
            print(f"submitted to Slurm: {', '.join(job.job_id for job in jobs)}", flush=True)
            try:
                return _wait(jobs, names)
            except BaseException:
                for job in jobs:
                    job.cancel(check=False)
                raise

        def _submit(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
            import submitit

            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            shared = {field.name for field in dataclasses.fields(BaseQueueConf)}
            params = {key: value for key, value in self.params.items() if value is not None}
            folder, retries = params.pop("submitit_folder"), params.pop("max_num_timeout", 0)
            named = {key if key in shared else f"slurm_{key}": value for key, value in params.items()}
            calls = [
                (list(overrides), "hydra.sweep.dir", first + i, f"job_id_for_{first + i}", Singleton.get_state())
                for i, overrides in enumerate(job_overrides)
            ]
            try:
                executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=retries)
                executor.update_parameters(**named)
                return list(executor.map_array(self, *zip(*calls, strict=True)))
            except (RuntimeError, submitit.core.utils.FailedJobError, NameError) as error:
                lines = [line for line in str(error).splitlines() if "rror" in line] or str(error).splitlines()
                gpus = "generic resource" in lines[-1]
                advice = "hydra.launcher.gpus_per_node=null asks for no GPU" if gpus else "see `sinfo`"
                raise UserError(
                    f"Slurm did not take the jobs ({lines[-1].strip()}); {advice}, and hydra.launcher.* are in "
                    "docs/cluster.md"
                ) from None


def _wait(jobs: Sequence[Job], names: Sequence[str]) -> list[JobReturn]:
    from layerbits.tracking.queue import GONE, states

    ended: dict[int, JobReturn] = {}
    since: dict[int, float] = {}
    while len(ended) < len(jobs):
        left = [i for i in range(len(jobs)) if i not in ended]
        seen = states([jobs[i].job_id for i in left])
        for i in left:
            state = seen[jobs[i].job_id].rstrip("+")
            if jobs[i].paths.result_pickle.exists() and state in GONE:
                ended[i] = _result(jobs[i], names[i])
            elif state not in GONE:
                since.pop(i, None)
            elif time.monotonic() - since.setdefault(i, time.monotonic()) > _LATE_SECONDS or state not in _MAY_BE_LATE:
                ended[i] = _dead(jobs[i], names[i], state)
        time.sleep(_POLL_SECONDS)
    return [ended[i] for i in range(len(jobs))]


_MAY_BE_LATE = ("COMPLETED", "UNKNOWN")


def _result(job: Job, name: str) -> JobReturn:
    import submitit

    try:
        (found,) = job.results()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return _dead(job, name, str(error).strip().splitlines()[-1])
    if found.status == JobStatus.FAILED:
        return _failed(name, str(found._return_value))
    if isinstance(found.return_value, str):  # the one line of a UserError
        return _failed(name, found.return_value)
    return found


def _dead(job: Job, name: str, state: str) -> JobReturn:
    from layerbits.tracking.dead_jobs import record_dead

    reason = f"Slurm job {job.job_id} ended as {state} without a result; its output is {job.paths.stderr}"
    try:
        record_dead(job.job_id, name, reason)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return _failed(name, reason)


def _failed(name: str, reason: str) -> JobReturn:
    print(f"error: {name}: {reason}", file=sys.stderr, flush=True)
    failed.append(reason)
    return JobReturn(overrides=name.split(), status=JobStatus.COMPLETED, _return_value=reason)
