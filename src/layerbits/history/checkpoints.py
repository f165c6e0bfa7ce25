"""Checkpoints that export runs have left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.history.source import RawRun, fetch, get_run, search, store_errors

_ARTIFACTS = "checkpoint"


@dataclass(frozen=True)
class ExportedScheme:
    """A scheme that an experiment has exported.

    Attributes:
        folder: Where its checkpoint was written; it may be on another machine, or gone.
        scheme: Name of the scheme.
        digest: Of the scheme: another run may use the same name for another one.
    """

    folder: Path
    scheme: str
    digest: str


def export_runs(uri: str, run_id: str) -> list[str]:
    """The runs of single exports that a run means: itself, or those below it that ended well, in their order.

    Raises:
        UserError: There is no such run, or none below it ended well.
    """
    run = get_run(uri, run_id)
    if run.tags.get("layerbits.kind") != "exports":
        return [run_id]
    condition = f"tags.mlflow.parentRunId = '{run_id}' and tags.outcome = 'ok'"
    run_ids = search(uri, str(run.info["experiment_id"]), condition, lambda child: child.run_id)
    if not run_ids:
        raise UserError(f"run {run_id} holds no export that ended well; export its schemes again")
    return run_ids


def exported(uri: str, experiment: str) -> list[ExportedScheme]:
    """Each export of an experiment that ended well, oldest first.

    Args:
        uri: The store.
        experiment: Experiment id.

    Raises:
        UserError: The store cannot be read.
    """
    condition = "tags.`layerbits.kind` = 'export' AND tags.outcome = 'ok'"
    with store_errors(uri):
        runs = search(uri, experiment, condition, lambda run: (run.tags, run.params))
    return [
        ExportedScheme(Path(tags["checkpoint.path"]), tags.get("scheme", ""), params.get("eff.scheme_digest", ""))
        for tags, params in runs
        if "checkpoint.path" in tags
    ]


def fetch_checkpoint(uri: str, run_id: str, to: Path) -> tuple[RawRun, Path]:
    """The checkpoint of an export run: where it was written, or downloaded where it was logged as artifacts.

    Args:
        uri: The store.
        run_id: An export run.
        to: Folder to download to; made if need be.

    Returns:
        The run and the checkpoint's folder.

    Raises:
        UserError: It is no finished export run, or its checkpoint is neither here nor among its artifacts.
    """
    run = get_run(uri, run_id)
    kind, outcome = run.tags.get("layerbits.kind"), run.tags.get("outcome")
    if kind != "export" or outcome != "ok":
        what = f"a run of kind {kind}" if kind else "a sensitivity run"
        if kind == "export":
            what = f"an export that ended as {outcome}"
        raise UserError(f"run {run_id} is {what}; give a finished run of `-e export`")
    path = Path(run.tags.get("checkpoint.path", ""))
    if (path / "config.json").is_file():
        return run, path
    artifacts = str(run.info["artifact_uri"])
    to.mkdir(parents=True, exist_ok=True)
    fetch(uri, artifacts, "checkpoint.json", to / "checkpoint.json")
    try:
        names = list(json.loads((to / "checkpoint.json").read_text("utf-8"))["files"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"checkpoint.json of run {run_id} is damaged; export the scheme again") from None
    folder = to / _ARTIFACTS
    folder.mkdir(exist_ok=True)
    for name in names:
        if Path(name).name != name:
            raise UserError(
                f"run {run_id} names a file {name!r}, which would leave its folder; export the scheme again"
            )
        try:
            fetch(uri, artifacts, f"{_ARTIFACTS}/{name}", folder / name)
        except UserError as error:
            raise UserError(f"the checkpoint of run {run_id} is not at {path}, and {error}; export it again") from None
    return run, folder
