"""What one result, or one cell without a result, leaves in MLflow."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.results.manifest import load_manifest
from layerbits.results.result import SensitivityResult
from layerbits.tracking import contract
from layerbits.tracking.links import linked, log_data, models_of, remark, tag_models, values_of
from layerbits.tracking.made import RECORD, Data, Made, Registration, read_record
from layerbits.tracking.registry import register
from layerbits.tracking.session import PARENT_VARIABLE, Ending, RunSession, ending_of, ending_of_children
from layerbits.tracking.store import experiment_id, impatient, one_line, open_store, patiently, wait_for
from layerbits.tracking.uris import redact
from layerbits.tracking.view import ensure_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_BATCH = 1000  # metrics that MLflow takes in one request
_CELL_STATUS = {"skipped": "FINISHED", "unsupported": "FAILED", "failed": "FAILED"}


class NotLogged(UserError):
    """The result is on disk, but the tracking store did not take it."""


def log_result(run: RunSession | str, result: SensitivityResult, directory: Path) -> None:
    """Logs everything of the contract to an open run; again to the same run changes nothing.

    Args:
        run: The session, or a run id in MLflow's current store.
        result: What was found.
        directory: The result's folder, complete, with its ``manifest.json``; logged as it is.

    Raises:
        NotLogged: The store failed; the message says how to log the folder later.
    """
    import mlflow

    run_id = run if isinstance(run, str) else run.run_id
    directory = Path(directory).absolute()
    try:
        wait_for(mlflow.get_tracking_uri())
        patiently(lambda: _log(mlflow.MlflowClient(), run_id, result, directory))
    except Exception as error:
        raise _not_logged(error, directory, run_id) from error


def log_cell(
    name: str,
    outcome: str,
    reason: str,
    *,
    experiment: str = "layerbits",
    parent_run_id: str | None = None,
    params: Mapping[str, str] | None = None,
    alias_of: str | None = None,
) -> str:
    """Records a cell of a sweep that has no result of its own, as a run that has ended.

    An alias that is recorded already, with the same parameters, is not recorded again.

    Args:
        name: Run name.
        outcome: ``skipped``, ``unsupported`` or ``failed``.
        reason: One line.
        experiment: Experiment of a cell without a parent.
        parent_run_id: The sweep's run; ``None`` looks in ``LAYERBITS_PARENT_RUN_ID``.
        params: Parameters that are known, by their names in the contract (``eff.quant_pair``, …).
        alias_of: Run id of the cell that is the same as this one.

    Returns:
        The run id.

    Raises:
        UserError: The store failed.
    """
    import mlflow
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    parent = parent_run_id or os.environ.get(PARENT_VARIABLE)
    tags = Ending(_CELL_STATUS[outcome], outcome, redact(" ".join(reason.split()))).tags
    if parent:
        tags["mlflow.parentRunId"] = parent
    try:
        where = client.get_run(parent).info.experiment_id if parent else experiment_id(experiment)
        if alias_of:
            tags["alias_of"] = alias_of
            # Not by name: a grid with other axes names its cells otherwise.
            known = f"tags.outcome = '{outcome}' and tags.alias_of = '{alias_of}'"
            for run in client.search_runs([where], known):
                if run.data.params == (params or {}):
                    return str(run.info.run_id)
        run_id = _create(client, where, name, tags)
        client.log_batch(run_id, params=[Param(key, value) for key, value in (params or {}).items()])
        client.set_terminated(run_id, _CELL_STATUS[outcome])
    except MlflowException as error:
        raise UserError(f"could not record {name} in {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    return run_id


def finished_run(cell: str, experiment_id: str) -> str | None:
    """Run id of a finished run of a cell (``tags.cell``) in an experiment, the latest first; ``None`` without one."""
    import mlflow

    runs = mlflow.MlflowClient().search_runs(
        [experiment_id], f"tags.cell = '{cell}' and tags.outcome = 'ok'", max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


def logged_run(directory: Path) -> str | None:
    """Id of the run that has everything of a result on disk, in any experiment; ``None`` without one.

    Raises:
        UserError: The store cannot be read.
    """
    return _finished_run_of(contract.RESULT_ID, contract.result_id(Path(directory)))


def run_of(record_id: str) -> str | None:
    """Id of the run that has everything of what was made, by :attr:`Made.record_id`; ``None`` without one.

    Raises:
        UserError: The store cannot be read.
    """
    return _finished_run_of(contract.RECORD_ID, record_id)


def _finished_run_of(tag: str, value: str) -> str | None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        run = _find(mlflow.MlflowClient(), tag, value)
    except MlflowException as error:
        raise UserError(f"cannot read {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    return str(run.info.run_id) if run is not None and run.data.tags.get("outcome") == "ok" else None


def register_run(run_id: str, wanted: Registration) -> None:
    """Registers what a finished run holds, where it is not registered already.

    Raises:
        UserError: The store has no registry, or refuses the name.
    """
    import mlflow

    register(mlflow.MlflowClient(), run_id, wanted)


def log_folder(run: RunSession, directory: Path, artifact_path: str) -> None:
    """Logs a folder's files under an artifact path of an open run."""
    import mlflow

    mlflow.MlflowClient().log_artifacts(run.run_id, str(directory), artifact_path)


def log_made(run: RunSession | str, made: Made) -> None:
    """Logs what was made from earlier runs (schemes, probes, exports, validations) to an open run.

    Args:
        run: The session, or a run id in MLflow's current store.
        made: With its record in its folder (:meth:`Made.save`). Its tags are set last, for they say that the rest is
            there; again to the same run changes nothing.

    Raises:
        NotLogged: The store failed; the message says how to log the folder later.
    """
    import mlflow

    run_id = run if isinstance(run, str) else run.run_id
    try:
        wait_for(mlflow.get_tracking_uri())
        patiently(lambda: _log_made(mlflow.MlflowClient(), run_id, made))
    except UserError:
        raise
    except Exception as error:
        raise _not_logged(error, made.folder, run_id) from error


def _not_logged(error: Exception, directory: Path, run_id: str) -> NotLogged:
    import mlflow

    uri = redact(mlflow.get_tracking_uri())
    return NotLogged(
        f"could not log to {uri} ({one_line(error)}); the result is on disk in {directory}, log it later with: "
        f"layerbits push {shlex.quote(str(directory))} --tracking-uri {shlex.quote(uri)} --run-id {run_id}"
    )


def push(
    directory: Path,
    tracking_uri: str | None = None,
    experiment: str = "layerbits",
    run_id: str | None = None,
    root: Path | None = None,
) -> str:
    """Logs a finished local result of any kind; where the store has it already, it stays as it is.

    Args:
        directory: The result's folder, or the folder of an exported checkpoint.
        tracking_uri: The store, as :func:`~layerbits.tracking.store.open_store` takes it.
        experiment: Experiment of the run, if one is created.
        run_id: The run that the job had opened for it; without, the run that an earlier push began, or a new one.
        root: Folder of the embedded store; the current one by default.

    Returns:
        The id of the run that has it.

    Raises:
        UserError: Not a result, or the store cannot be used.
        NotLogged: The store failed in between; push again.
    """
    finished = _finished(Path(directory).absolute())
    open_store(tracking_uri, root or Path.cwd())
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        run = _find(client, *finished.tag)
        if run is not None and run.data.tags.get("outcome") == finished.ending.outcome:
            return str(run.info.run_id)
        if run_id is not None:
            run = client.get_run(run_id)
        if run is None:
            tags = dict([finished.tag]) | finished.tags
            run_id = _create(client, experiment_id(experiment), finished.name, tags, finished.started)
        else:
            run_id = str(run.info.run_id)
        try:
            finished.log(run_id)
        except BaseException:
            with suppress(Exception), impatient():
                client.set_terminated(run_id, "FAILED")
            raise
        _end_pushed(client, run_id, finished, run)
    except MlflowException as error:
        raise UserError(f"cannot push to {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    return run_id


@dataclass(frozen=True)
class _Finished:
    """A finished result on disk, of any kind.

    Attributes:
        tag: Key and value that name it wherever it is logged.
        tags: Further ones of a run that is made for it.
        parent: Whether a run that was opened for it ends as its children do.
        started, ended: Unix milliseconds; ``None`` = now.
        log: Logs it to a run.
    """

    tag: tuple[str, str]
    name: str
    tags: dict[str, str]
    ending: Ending
    started: int | None
    ended: int | None
    log: Callable[[str], None]
    parent: bool = False


def _finished(directory: Path) -> _Finished:
    """What a folder holds.

    Raises:
        UserError: No result.
    """
    report = directory.with_name(f"{directory.name}.report")  # of an exported checkpoint
    for folder in (directory, report):
        if recorded := read_record(folder):
            made, tags = recorded.made, {"layerbits.kind": recorded.kind} if recorded.kind else {}
            ending = Ending("FINISHED", "ok") if made.failure is None else ending_of(made.failure)
            log = partial(log_made, made=made)
            tag = (contract.RECORD_ID, made.record_id)
            return _Finished(tag, recorded.name, tags, ending, None, None, log, recorded.parent)
    if not (directory / "manifest.json").is_file() and directory.is_dir():
        raise UserError(
            f"{directory} has neither a manifest.json nor a {RECORD}; give the folder that a job named as its result"
        )
    result = load_manifest(directory)
    ended = contract.milliseconds(result)
    started = ended - int(1000 * sum(result.seconds.values()))
    return _Finished(
        (contract.RESULT_ID, contract.result_id(directory)),
        result.run_name,
        {},
        Ending("FINISHED", "ok"),
        started,
        ended,
        lambda run_id: log_result(run_id, result, directory),
    )


def _end_pushed(client: MlflowClient, run_id: str, finished: _Finished, run: Run | None) -> None:
    from mlflow.entities import RunTag

    ending = finished.ending
    if run is not None and finished.parent:
        ending = ending_of_children(client, run.info.experiment_id, run_id)
    # Ended before it is tagged: a watchdog of the job that opened the run leaves one alone that has ended.
    end = (run.info.end_time if run else None) or finished.ended
    client.set_terminated(run_id, ending.status, end)
    if "reason" in client.get_run(run_id).data.tags and not ending.reason:
        client.delete_tag(run_id, "reason")
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in ending.tags.items()])
    if client.get_run(run_id).info.status != ending.status:  # the watchdog had looked before, and wrote after
        client.set_terminated(run_id, ending.status, end)
    ensure_view(client, client.get_run(run_id).info.experiment_id)


def _log_made(client: MlflowClient, run_id: str, made: Made) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(1000 * time.time())
    finite = [Metric(key, value, now, 0) for key, value in made.finite.items()]
    client.set_tag(run_id, contract.RECORD_ID, made.record_id)
    client.log_artifacts(run_id, str(made.folder))
    for path, folder in made.artifacts.items():
        client.log_artifacts(run_id, str(folder), path)
    client.log_batch(run_id, params=[Param(key, value) for key, value in made.params.items()])
    log_data(client, run_id, made.data)
    experiment = client.get_run(run_id).info.experiment_id if made.measured or made.remarks else ""
    ids = models_of(client, experiment, run_id, made.measured)
    tag_models(client, made.measured, ids)
    finite = linked(run_id, finite, made.measured, made.data, ids)
    finite += values_of(run_id, made.measured, made.data, ids, now)
    for first in range(0, len(finite), _BATCH):
        client.log_batch(run_id, metrics=finite[first : first + _BATCH])
    remark(client, experiment, made.remarks)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in made.tags.items()])
    if made.registration is not None:
        register(client, run_id, made.registration)


def _log(client: MlflowClient, run_id: str, result: SensitivityResult, directory: Path) -> None:
    from mlflow.entities import Metric, Param, RunTag

    start = time.perf_counter()
    at = contract.milliseconds(result)
    client.set_tag(run_id, contract.RESULT_ID, contract.result_id(directory))
    client.log_artifacts(run_id, str(directory))
    client.log_text(run_id, contract.table(result), contract.TABLE)
    if captions := contract.dataset(result):
        log_data(client, run_id, [Data(captions, "calibration")])
    client.log_batch(run_id, params=[Param(*item) for item in contract.parameters(result).items()])
    metrics = [Metric(key, value, at, step) for key, value, step in contract.metrics(result)]
    metrics.append(Metric("seconds/log", time.perf_counter() - start, at, 0))
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + _BATCH])
    # Last, for they say that the rest is there.
    client.log_batch(run_id, tags=[RunTag(*item) for item in contract.tags(result).items()])


def _find(client: MlflowClient, tag: str, value: str) -> Run | None:
    """The run of a result in any experiment, a finished one first."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{tag}` = '{value}'")
    return next(iter(sorted(runs, key=lambda run: run.data.tags.get("outcome") != "ok")), None)


def _create(client: MlflowClient, where: str, name: str, tags: Mapping[str, str], start_time: int | None = None) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    context = resolve_tags(dict(tags))  # user and source, as MLflow's own start_run tags them
    if start_time is not None:  # made earlier, of a source that the checkout around us need not be
        context = {key: value for key, value in context.items() if not key.startswith("mlflow.source.")}
    return str(client.create_run(where, start_time, context, name).info.run_id)
