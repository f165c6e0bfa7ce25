"""What one result, or one cell without a result, leaves in MLflow."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from layerbits.errors import UserError
from layerbits.results.manifest import load_manifest
from layerbits.results.result import SensitivityResult
from layerbits.tracking import contract
from layerbits.tracking.session import PARENT_VARIABLE, Ending, RunSession
from layerbits.tracking.store import experiment_id, impatient, one_line, open_store, wait_for
from layerbits.tracking.uris import redact
from layerbits.tracking.view import ensure_view

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
        _log(mlflow.MlflowClient(), run_id, result, directory)
    except Exception as error:
        uri = redact(mlflow.get_tracking_uri())
        raise NotLogged(
            f"could not log to {uri} ({one_line(error)}); the result is on disk in {directory}, log it later with: "
            f"layerbits push {shlex.quote(str(directory))} --tracking-uri {shlex.quote(uri)} --run-id {run_id}"
        ) from error


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
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        found = _find(mlflow.MlflowClient(), contract.result_id(Path(directory)))
    except MlflowException as error:
        raise UserError(f"cannot read {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    return str(found.info.run_id) if found is not None and found.data.tags.get("outcome") == "ok" else None


def log_folder(run: RunSession, directory: Path, artifact_path: str) -> None:
    """Logs a folder's files under an artifact path of an open run."""
    import mlflow

    mlflow.MlflowClient().log_artifacts(run.run_id, str(directory), artifact_path)


def log_derived(
    run: RunSession,
    directory: Path,
    metrics: Mapping[str, float],
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Logs what was made from earlier runs (schemes, probes, exports, validations) to an open run.

    Args:
        run: The session.
        directory: The result's folder, complete on disk; logged as it is.
        metrics: Values; those that are not finite are left out, as a chart would show them as 1.8e308.
        params: Parameters by their names in the contract.
        tags: Tags, ``source_run_id`` among them; set last, for they say that the rest is there.

    Raises:
        NotLogged: The store failed; the message says where the result is.
    """
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    uri = mlflow.get_tracking_uri()
    now = int(1000 * time.time())
    finite = [Metric(key, float(value), now, 0) for key, value in metrics.items() if math.isfinite(value)]
    try:
        wait_for(uri)
        client = mlflow.MlflowClient()
        client.log_artifacts(run.run_id, str(directory))
        client.log_batch(run.run_id, params=[Param(key, value) for key, value in (params or {}).items()])
        for first in range(0, len(finite), _BATCH):
            client.log_batch(run.run_id, metrics=finite[first : first + _BATCH])
        client.log_batch(run.run_id, tags=[RunTag(key, value) for key, value in (tags or {}).items()])
    except Exception as error:
        raise NotLogged(
            f"could not log to {redact(uri)} ({one_line(error)}); the result is on disk in {directory}"
        ) from error


def push(
    directory: Path,
    tracking_uri: str | None = None,
    experiment: str = "layerbits",
    run_id: str | None = None,
    root: Path | None = None,
) -> str:
    """Logs a finished local result; where the store has it already, it stays as it is.

    Args:
        directory: The result's folder.
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
    directory = Path(directory).absolute()
    result = load_manifest(directory)
    open_store(tracking_uri, root or Path.cwd())
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    made = contract.milliseconds(result)
    try:
        known = contract.result_id(directory)
        found = _find(client, known)
        if found is not None and found.data.tags.get("outcome") == "ok":
            return str(found.info.run_id)
        if run_id is not None:
            found = client.get_run(run_id)
        if found is None:
            started = made - int(1000 * sum(result.seconds.values()))
            run_id = _create(client, experiment_id(experiment), result.run_name, {contract.RESULT_ID: known}, started)
        else:
            run_id = str(found.info.run_id)
        try:
            log_result(run_id, result, directory)
        except BaseException:
            with suppress(Exception), impatient():
                client.set_terminated(run_id, "FAILED")
            raise
        if found is not None and "reason" in found.data.tags:
            client.delete_tag(run_id, "reason")
        client.set_terminated(run_id, "FINISHED", (found.info.end_time if found else None) or made)
        ensure_view(client, client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        raise UserError(f"cannot push to {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    return run_id


def _log(client: Any, run_id: str, result: SensitivityResult, directory: Path) -> None:
    from mlflow.entities import Metric, Param, RunTag

    start = time.perf_counter()
    at = contract.milliseconds(result)
    client.set_tag(run_id, contract.RESULT_ID, contract.result_id(directory))
    client.log_artifacts(run_id, str(directory))
    client.log_text(run_id, contract.table(result), contract.TABLE)
    if captions := contract.dataset(result):
        _log_captions(client, run_id, captions)
    client.log_batch(run_id, params=[Param(*item) for item in contract.parameters(result).items()])
    metrics = [Metric(key, value, at, step) for key, value, step in contract.metrics(result)]
    metrics.append(Metric("seconds/log", time.perf_counter() - start, at, 0))
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + _BATCH])
    # Last, for they say that the rest is there.
    client.log_batch(run_id, tags=[RunTag(*item) for item in contract.tags(result).items()])


def _log_captions(client: Any, run_id: str, captions: Mapping[str, str]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    inputs = [DatasetInput(Dataset(**captions), [InputTag("mlflow.data.context", "calibration")])]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as error:
        # Of two runs that bring the same new dataset at once, PostgreSQL refuses one; now it is there.
        if error.error_code != "BAD_REQUEST":
            raise
        client.log_inputs(run_id, inputs)


def _find(client: Any, result_id: str) -> Any:
    """The run of a result in any experiment, a finished one first."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{contract.RESULT_ID}` = '{result_id}'")
    return next(iter(sorted(runs, key=lambda run: run.data.tags.get("outcome") != "ok")), None)


def _create(client: Any, where: str, name: str, tags: Mapping[str, str], start_time: int | None = None) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    context = resolve_tags(dict(tags))  # user and source, as MLflow's own start_run tags them
    if start_time is not None:  # made earlier, of a source that the checkout around us need not be
        context = {key: value for key, value in context.items() if not key.startswith("mlflow.source.")}
    return str(client.create_run(where, start_time, context, name).info.run_id)
