"""What LayerBits writes to MLflow, and nothing else does: stores, runs and what a result leaves in one.

``docs/tracking.md`` is the contract. Importing this package does not import mlflow.
"""

from layerbits.tracking.log import (
    NotLogged,
    finished_run,
    log_cell,
    log_folder,
    log_made,
    log_result,
    logged_run,
    push,
    register_run,
    run_of,
)
from layerbits.tracking.made import Made, Registration
from layerbits.tracking.session import PARENT_VARIABLE, RunSession, Terminated, parent_run, start_run
from layerbits.tracking.store import open_store
from layerbits.tracking.uris import redact

__all__ = [
    "PARENT_VARIABLE",
    "Made",
    "NotLogged",
    "Registration",
    "RunSession",
    "Terminated",
    "finished_run",
    "log_cell",
    "log_folder",
    "log_made",
    "log_result",
    "logged_run",
    "open_store",
    "parent_run",
    "push",
    "redact",
    "register_run",
    "run_of",
    "start_run",
]
