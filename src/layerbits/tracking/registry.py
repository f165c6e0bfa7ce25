"""Checkpoints in MLflow's model registry."""

from __future__ import annotations

from collections.abc import Mapping

from layerbits.errors import UserError
from layerbits.tracking.session import RunSession
from layerbits.tracking.store import one_line
from layerbits.tracking.uris import redact


def register_checkpoint(run: RunSession, name: str, tags: Mapping[str, str], artifact_path: str = "") -> str:
    """Makes a version of a registered model of what an open run holds.

    Args:
        run: The session of the export; the version points to its artifacts.
        name: Registered model; created where there is none.
        tags: Of the version.
        artifact_path: Folder of the run's artifacts that the version is; empty = all of them.

    Returns:
        The version's number.

    Raises:
        UserError: The store has no registry, or refuses the name.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = "/".join(filter(None, (str(client.get_run(run.run_id).info.artifact_uri), artifact_path)))
        return str(client.create_model_version(name, source, run.run_id, tags=dict(tags)).version)
    except MlflowException as error:
        raise UserError(
            f"cannot register {name} in {redact(run.tracking_uri)} ({one_line(error)}); the checkpoint is logged, "
            "leave register out or mend the registry"
        ) from error
