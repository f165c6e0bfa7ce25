"""Closes runs whose process is gone: SIGKILL, power and the end of a container leave them RUNNING for ever."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from layerbits.errors import UserError
from layerbits.tracking.contract import PROCESS, STATUS
from layerbits.tracking.store import one_line, open_store
from layerbits.tracking.uris import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PREFIXES = (PROCESS, "process.")  # the second in runs of the first days


@dataclass(frozen=True)
class Reaped:
    """A run that was closed, as what, and why."""

    run_id: str
    name: str
    outcome: str
    reason: str


def process_tags() -> dict[str, str]:
    """Tags that tell this process from every other that was or will be; none where there is no ``/proc``.

    The number of a process means something in one namespace of one boot of one machine only, and is given again: so
    all of these are noted, and when the process started, in clock ticks after the boot (``proc(5)``).
    """
    if sys.platform != "linux":
        return {}
    here = {**_here(), "pid": str(os.getpid()), "started": _started(os.getpid()) or ""}
    return {f"{PROCESS}{name}": value for name, value in here.items()}


def reap(tracking_uri: str | None = None, root: Path | None = None, named: Sequence[str] = ()) -> list[Reaped]:
    """Ends the RUNNING runs of this machine whose process is gone as KILLED, with ``outcome`` and ``reason``.

    A run that was killed after it had recorded its outcome ends as that.

    Args:
        tracking_uri: The store, as :func:`~layerbits.tracking.store.open_store` takes it.
        root: Folder of the embedded store; the current one by default.
        named: Ids of the runs to end, where the user knows that their process is gone and nobody here can say.

    Returns:
        The runs that were closed. Unless they are named, those of other machines and containers are left alone, and
        those that say nothing of their process: its tags are missing where ``mlflow run`` was killed together with a
        job that had not got as far as to open the run.

    Raises:
        UserError: The store cannot be used, a named run is not there, or its process is.
    """
    uri = open_store(tracking_uri, root or Path.cwd())
    from mlflow import MlflowClient
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    reaped = []
    try:
        for run in map(client.get_run, named) if named else _running(client):
            reason = why_gone(run.data.tags, _last_sign(run))
            if named and reason is None:
                if is_here(run.data.tags):
                    raise UserError(f"run {run.info.run_id} is held by a process of this machine; stop that instead")
                reason = "ended by hand"
            # Asked again: a process ends its run before itself, and may have just done so.
            if reason is None or client.get_run(run.info.run_id).info.status != "RUNNING":
                continue
            outcome = run.data.tags.get("outcome")
            if outcome is None:
                outcome = "killed"
                client.log_batch(run.info.run_id, tags=[RunTag("outcome", outcome), RunTag("reason", reason)])
            # Tags are written last: what recorded its outcome before it was killed has everything.
            client.set_terminated(run.info.run_id, STATUS.get(outcome, "FAILED"), _last_sign(run))
            reaped.append(Reaped(run.info.run_id, run.info.run_name, outcome, reason))
    except MlflowException as error:
        raise UserError(f"cannot close runs in {redact(uri)}: {one_line(error)}") from error
    return reaped


def why_gone(tags: Mapping[str, str], last_sign: int) -> str | None:
    """Why the process of a run is certainly gone, in one line; ``None`` where it is not, or nobody here can say.

    Args:
        tags: The run's.
        last_sign: When it last logged something, Unix milliseconds.
    """
    of, here = _process(tags), _here()
    if sys.platform != "linux" or {*here, "pid", "started"} - set(of) or of["host"] != here["host"]:
        return None
    if of["boot"] != here["boot"]:
        # Names of machines are not unique. What was logged since our boot did not come from before it.
        rebooted = of["machine"] == here["machine"] != "" and last_sign < psutil.boot_time() * 1000
        return f"{here['host']} was started again since" if rebooted else None
    if of["namespace"] != here["namespace"]:
        return None  # the numbers of another container's processes mean something else here
    pid = int(of["pid"])
    if _started(pid) == of["started"] or (_started(pid) is None and _exists(pid)):
        return None
    return f"process {pid} on {here['host']} is gone"


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process of a run is certainly there."""
    of, here = _process(tags), _here()
    same = all(of.get(name) == here[name] for name in ("host", "boot", "namespace"))
    return same and "pid" in of and _started(int(of["pid"])) == of.get("started", "") != ""


def _process(tags: Mapping[str, str]) -> dict[str, str]:
    return next((tags_below for prefix in _PREFIXES if (tags_below := _below(prefix, tags))), {})


def _running(client: MlflowClient) -> list[Run]:
    runs: dict[str, Run] = {}
    for experiment in _experiments(client):
        for prefix in _PREFIXES:  # MLflow's filters have no OR
            condition = f"attributes.status = 'RUNNING' AND tags.`{prefix}host` = '{socket.gethostname()}'"
            token = None
            while True:
                page = client.search_runs([experiment], condition, max_results=200, page_token=token)
                runs |= {run.info.run_id: run for run in page}
                token = page.token
                if not token:
                    break
    return list(runs.values())


def _below(prefix: str, tags: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}


def _experiments(client: MlflowClient) -> list[str]:
    ids: list[str] = []
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        ids += [experiment.experiment_id for experiment in page]
        token = page.token
        if not token:
            return ids


def _last_sign(run: Run) -> int:
    times = [metric.timestamp for metric in run.data._metric_objs]
    return int(max([run.info.start_time, *times]))


def _here() -> dict[str, str]:
    """This machine, its boot, and the namespace of its process numbers."""
    machine = _read("/etc/machine-id")
    return {
        "host": socket.gethostname(),
        # Confidential, says machine-id(5): only its hash leaves the machine.
        "machine": hashlib.sha256(machine.encode()).hexdigest()[:16] if machine else "",
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
    }


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Clock ticks from the boot to the start of a process; ``None`` without such a process, or a dead one."""
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return None
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Whether there is a live process that ``/proc`` does not show us (``hidepid``)."""
    if _read(f"/proc/{pid}/stat"):
        return False  # shown, as a dead one
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return ""
