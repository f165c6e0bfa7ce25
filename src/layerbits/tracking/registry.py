"""Checkpoints in MLflow's model registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.tracking.made import Registration
from layerbits.tracking.store import one_line
from layerbits.tracking.uris import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST = "checkpoint.digest"


def check_name(name: str) -> None:
    """Checks the name of a registered model before anything is made.

    Raises:
        UserError: MLflow does not take it.
    """
    if not name.strip() or "/" in name or ":" in name:
        raise UserError(
            f"registered_model={name} is no name of a registered model: MLflow takes none with / or :; set "
            "registered_model to another one"
        )


def register(client: MlflowClient, run_id: str, wanted: Registration) -> str:
    """Makes a version of a registered model of what a run holds; a version of the same checkpoint and run stays.

    Args:
        client: Of the store.
        run_id: The version points to its artifacts.
        wanted: Name and tags; the model is created where there is none.

    Returns:
        The version's number.

    Raises:
        UserError: The store has no registry, or refuses the name.
    """
    from mlflow.exceptions import MlflowException

    try:
        try:
            client.create_registered_model(wanted.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = registered_version(client, run_id, wanted)
        if version is None:
            place = (str(client.get_run(run_id).info.artifact_uri), wanted.artifact_path)
            source = "/".join(filter(None, place))
            version = str(client.create_model_version(wanted.name, source, run_id, tags=dict(wanted.tags)).version)
    except MlflowException as error:
        raise UserError(
            f"cannot register {wanted.name} in {redact(str(client.tracking_uri))} ({one_line(error)}); the checkpoint "
            "is logged, leave register out or repair the registry"
        ) from error
    print(f"registered: models:/{wanted.name}/{version}", flush=True)
    return version


def registered_version(client: MlflowClient, run_id: str, wanted: Registration) -> str | None:
    """The version that a run has of a registered model; ``None`` without one."""
    from mlflow.exceptions import MlflowException

    try:
        versions = client.search_model_versions(f"run_id = '{run_id}'")
    except MlflowException:
        return None
    same = (v for v in versions if v.name == wanted.name and v.tags.get(_DIGEST) == wanted.tags.get(_DIGEST))
    return next((str(v.version) for v in same), None)
