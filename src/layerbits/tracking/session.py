"""The life of a run: resumed or created, child or parent, and ended as what happened."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from layerbits.errors import Skipped, Unsupported, UserError
from layerbits.results.experiment import Experiment
from layerbits.tracking import queue
from layerbits.tracking.artifacts import check_reachable
from layerbits.tracking.process_watchdog import close_later, keep_killed
from layerbits.tracking.progress_metrics import progress_metrics
from layerbits.tracking.reap import process_tags
from layerbits.tracking.store import answers, experiment_id, impatient, one_line, patiently
from layerbits.tracking.uris import redact, run_link, ui_command
from layerbits.tracking.view import print_view

if TYPE_CHECKING:
    from signal import _HANDLER as Handler

    from mlflow import MlflowClient

PARENT_VARIABLE = "LAYERBITS_PARENT_RUN_ID"
"""Environment variable that makes the runs of this process and its children nested runs of one parent."""

_SYSTEM_METRICS_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class RunSession:
    """An open run.

    Attributes:
        tracking_uri: The store it is in.
        resumed: Whether ``mlflow run`` had created it.
        nested: Whether it has a parent run.
    """

    run_id: str
    experiment_id: str
    tracking_uri: str
    resumed: bool
    nested: bool

    @property
    def link(self) -> str:
        """Address of the run in the UI."""
        return run_link(self.tracking_uri, self.experiment_id, self.run_id)

    def experiment(self, name: str) -> Experiment:
        """The run as what it makes on a disk names it.

        Args:
            name: Its name.
        """
        import mlflow

        of = mlflow.MlflowClient(self.tracking_uri).get_experiment(self.experiment_id).name
        return Experiment(of, name, self.run_id, self.link, redact(self.tracking_uri))


class Terminated(SystemExit):
    """SIGTERM or SIGHUP, raised in the main thread so that the run is closed on the way out."""


@dataclass(frozen=True)
class Ending:
    """How a run ended: MLflow's status, and our ``outcome`` and ``reason`` tags."""

    status: str
    outcome: str
    reason: str = ""
    counts: Mapping[str, int] | None = None

    @property
    def tags(self) -> dict[str, str]:
        """The tags that say so."""
        tags = {"outcome": self.outcome}
        if self.reason:
            tags["reason"] = self.reason
        return tags | {f"children.{name}": str(count) for name, count in (self.counts or {}).items()}


_OK = Ending("FINISHED", "ok")
_reachable: set[tuple[str, str]] = set()
"""Stores and experiments whose artifacts were seen to arrive."""


@contextmanager
def start_run(
    name: str,
    experiment: str = "layerbits",
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    system_metrics: bool = True,
) -> Iterator[RunSession]:
    """Opens MLflow's active run in the store of :func:`~layerbits.tracking.store.open_store`.

    The run that ``mlflow run`` created is resumed where there is one, and keeps the name that ``--run-name`` gave
    it. Otherwise a run is created: in ``experiment``, or beside its parent. However the body ends, the run ends with
    it (``docs/tracking.md`` says how); then its link is printed.

    Args:
        name: Run name.
        experiment: Experiment of a run that is created without a parent.
        parent_run_id: Makes it a nested run; ``None`` looks in ``LAYERBITS_PARENT_RUN_ID``.
        tags: Tags from the start.
        system_metrics: Sample processor, memory, network and GPU while it is open.

    Raises:
        UserError: The run cannot be started, or not be closed.
    """
    session = _open(name, experiment, parent_run_id or os.environ.get(PARENT_VARIABLE), tags, system_metrics)
    stop = _Stop(with_parent=session.resumed)
    ending = Ending("KILLED", "killed", "stopped twice")  # unless we get as far as to know better
    try:
        with stop.watching(), progress_metrics(session.tracking_uri, session.run_id):
            _check_artifacts(session)
            yield session
        ending = _OK
    except BaseException as error:
        ending = ending_of(error)
        raise
    finally:
        with stop.shielded():
            _close(session, ending)


@contextmanager
def parent_run(name: str, experiment: str = "layerbits", tags: Mapping[str, str] | None = None) -> Iterator[RunSession]:
    """A run whose children are the runs started in the body, in this process or in ones that it starts.

    Its id is in the environment (``LAYERBITS_PARENT_RUN_ID``) meanwhile. It ends as its children did: FINISHED where
    none failed; FAILED where one did, with ``outcome`` partial where others succeeded; KILLED where it or one of them
    was stopped; skipped where :class:`~layerbits.errors.Skipped` leaves the body and no child says otherwise. Tags
    ``children.<outcome>`` count them.

    Raises:
        UserError: The run cannot be started, or not be closed.
    """
    session = _open(name, experiment, os.environ.get(PARENT_VARIABLE), tags, system_metrics=False)
    stop = _Stop(with_parent=session.resumed)
    outer = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = session.run_id
    error: BaseException | None = None
    try:
        with stop.watching(), progress_metrics(session.tracking_uri, session.run_id):
            _check_artifacts(session)
            yield session
    except BaseException as caught:
        error = caught
        raise
    finally:
        with stop.shielded():
            if outer is None:
                del os.environ[PARENT_VARIABLE]
            else:
                os.environ[PARENT_VARIABLE] = outer
            _close(session, _parent_ending(session, error, stop.received), "all together")


def ending_of(error: BaseException) -> Ending:
    """What an exception that leaves the body makes of the run."""
    if isinstance(error, Skipped):
        return Ending("FINISHED", "skipped", one_line(error))
    if isinstance(error, Unsupported):
        return Ending("FAILED", "unsupported", one_line(error))
    if isinstance(error, UserError):
        return Ending("FAILED", "failed", one_line(error))
    if isinstance(error, KeyboardInterrupt):
        return Ending("KILLED", "killed", "interrupted from the keyboard")
    if isinstance(error, Terminated):
        return Ending("KILLED", "killed", f"stopped by {signal.Signals(int(error.code or 0) - 128).name}")
    if isinstance(error, SystemExit):
        return _OK if error.code in (None, 0) else Ending("FAILED", "failed", f"exit status {redact(str(error.code))}")
    text = one_line(error)
    name = type(error).__name__
    return Ending("FAILED", "failed", text if text == name else f"{name}: {text}")


def _open(
    name: str, experiment: str, parent_run_id: str | None, tags: Mapping[str, str] | None, system_metrics: bool
) -> RunSession:
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    uri = mlflow.get_tracking_uri()
    # MLflow tells of every start and stop of its sampler.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    if "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL" not in os.environ:
        mlflow.set_system_metrics_sampling_interval(_SYSTEM_METRICS_SECONDS)
    tags = {**process_tags(), **(tags or {})}
    resumed = os.environ.get("MLFLOW_RUN_ID")
    job = None if mlflow.active_run() else queue.own_job()
    if job:
        tags[queue.JOB_TAG] = job
    client = mlflow.MlflowClient()
    try:
        if resumed:
            if parent_run_id:
                tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
            own_name = None if _named_by_user(client.get_run(resumed).info.run_name) else name
            run = mlflow.start_run(
                run_id=resumed, run_name=own_name, nested=True, tags=tags, log_system_metrics=system_metrics
            )
            del os.environ["MLFLOW_RUN_ID"]  # a second run of this process is not the one that `mlflow run` made
        else:
            where = client.get_run(parent_run_id).info.experiment_id if parent_run_id else experiment_id(experiment)
            requeued = queue.earlier_run(client, where) if job else None
            if requeued:
                _forget_ending(client, requeued)
                run = mlflow.start_run(run_id=requeued, nested=True, tags=tags, log_system_metrics=system_metrics)
            else:
                run = mlflow.start_run(
                    experiment_id=where,
                    run_name=name,
                    nested=True,
                    parent_run_id=parent_run_id,
                    tags=tags,
                    log_system_metrics=system_metrics,
                )
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(
                f"run {resumed or parent_run_id} is not in {redact(uri)}; give `mlflow run` the same store "
                "(MLFLOW_TRACKING_URI, a SQLite path absolute)"
            ) from error
        raise UserError(f"cannot start a run in {redact(uri)}: {one_line(error)}") from error
    return RunSession(run.info.run_id, run.info.experiment_id, uri, resumed is not None, bool(parent_run_id))


def _check_artifacts(session: RunSession) -> None:
    """Checks, once a process and experiment, that what is logged arrives.

    Raises:
        UserError: It would be written to a disk that the server does not see.
    """
    import mlflow

    if (session.tracking_uri, session.experiment_id) not in _reachable:
        check_reachable(session.tracking_uri, mlflow.MlflowClient(session.tracking_uri).get_run(session.run_id).info)
        _reachable.add((session.tracking_uri, session.experiment_id))


def _forget_ending(client: MlflowClient, run_id: str) -> None:
    """Takes back how a run ended that now goes on."""
    for tag in ("outcome", "reason"):
        if tag in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, tag)


def _named_by_user(name: str | None) -> bool:
    """Whether a run name is not one of those that MLflow makes up (``predicate-noun-number``)."""
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    predicate, _, rest = (name or "").partition("-")
    noun, _, number = rest.partition("-")
    made_up = predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdigit()
    return bool(name) and not made_up


def _close(session: RunSession, ending: Ending, what: str = "run") -> None:
    """Tags the outcome and ends the run, in seconds even where the server is gone; prints its link.

    Args:
        session: The run.
        ending: How it ends.
        what: What its line calls it.

    Raises:
        UserError: The run ended well but could not be closed.
    """
    import mlflow
    from mlflow.entities import RunTag

    client = mlflow.MlflowClient(session.tracking_uri)
    reachable = answers(session.tracking_uri)
    try:
        with nullcontext() if reachable else impatient():
            try:
                if reachable:
                    tags = [RunTag(*tag) for tag in ending.tags.items()]
                    patiently(lambda: client.log_batch(session.run_id, tags=tags))
            finally:  # off MLflow's stack in all cases, or it is FINISHED at exit
                _end(client, session.run_id, ending.status)
    except Exception as error:
        close_later(session.tracking_uri, session.run_id, ending.status, ending.tags)
        message = (
            f"run {session.run_id} could not be closed in {redact(session.tracking_uri)} ({one_line(error)}); it is "
            f"closed within ten minutes once the store answers, after that by: layerbits reap {session.run_id}"
        )
        if ending is _OK:
            raise UserError(message) from error
        print(message, file=sys.stderr)
    if session.resumed and ending.status == "KILLED":
        keep_killed(session.tracking_uri, session.run_id)
    print(f"{what} {ending.outcome}: {session.link}", flush=True)
    if session.nested:
        return
    if command := ui_command(session.tracking_uri):
        print(f"open the UI with: {command}", flush=True)
    if ending.outcome in ("ok", "partial"):
        print_view(client, session.tracking_uri, session.experiment_id)


def _end(client: MlflowClient, run_id: str, status: str) -> None:
    import mlflow

    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:  # the body ended or covered it
        client.set_terminated(run_id, status)


def _parent_ending(session: RunSession, error: BaseException | None, received: int | None) -> Ending:
    import mlflow

    if error is None and received is not None:
        error = Terminated(128 + received) if received != signal.SIGINT else KeyboardInterrupt()
    try:
        with impatient():
            client = mlflow.MlflowClient(session.tracking_uri)
            return ending_of_children(client, session.experiment_id, session.run_id, error)
    except Exception as lost:
        return Ending("FAILED", "failed", f"its children could not be read: {one_line(lost)}")


def ending_of_children(
    client: MlflowClient, experiment_id: str, run_id: str, error: BaseException | None = None
) -> Ending:
    """What its children make of a parent run.

    Args:
        client: Of the store.
        experiment_id: Of the parent.
        run_id: The parent.
        error: What left its body.
    """
    condition = f"tags.mlflow.parentRunId = '{run_id}'"
    children = patiently(lambda: client.search_runs([experiment_id], condition, max_results=10_000))
    counts = Counter(child.data.tags.get("outcome", "failed") for child in children)
    if error is not None and not isinstance(error, Exception):
        stopped = ending_of(error)
        return Ending(stopped.status, stopped.outcome, stopped.reason, counts)
    if counts["killed"]:
        return Ending("KILLED", "killed", "a child run was stopped", counts)
    if isinstance(error, Skipped) and not counts["ok"] and not counts["failed"]:
        skipped = ending_of(error)
        return Ending(skipped.status, skipped.outcome, skipped.reason, counts)
    if not counts["ok"] and (error is not None or counts["failed"] or counts["unsupported"] or not counts):
        reason = ending_of(error).reason if error is not None else "no child run succeeded"
        return Ending("FAILED", "failed", reason, counts)
    if counts["failed"] or error is not None:
        # Such a sweep exits non-zero, and FAILED is what `mlflow run` makes of that.
        some = f"{counts['failed']} of {counts.total()} child runs failed"
        reason = some if error is None or counts["failed"] else ending_of(error).reason
        return Ending("FAILED", "partial", reason, counts)
    return Ending("FINISHED", "ok", counts=counts)


class _Stop:
    """Stop signals as exceptions while a run is open; ignored while it is being closed.

    ``mlflow run`` answers Ctrl-C, which reaches the job as well, with SIGTERM to the job: the second must not
    interrupt what the first started.

    Args:
        with_parent: Take the death of the parent process for SIGTERM (Linux). ``mlflow run`` dies of a SIGTERM
            without a word to its job, which would go on and hold the GPU.
    """

    def __init__(self, with_parent: bool) -> None:
        self.received: int | None = None
        self._with_parent = with_parent and sys.platform == "linux"
        self._closing = False
        self._previous: dict[int, Handler] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):  # nohup stays nohup
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
            if self._with_parent:
                _signal_of_parent_death(signal.SIGTERM)
        yield

    @contextmanager
    def shielded(self) -> Iterator[None]:
        self._closing = True
        try:
            yield
        finally:
            if self._with_parent:
                _signal_of_parent_death(0)
            for number, previous in self._previous.items():
                signal.signal(number, previous)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._closing:
            return
        self.received = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(128 + number)


def _signal_of_parent_death(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
