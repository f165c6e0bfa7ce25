"""What LayerBits writes to MLflow, and nothing else does: stores, runs and what a result leaves in one.

``docs/tracking.md`` is the contract. Importing this package does not import mlflow.
"""

from layerbits.tracking.log import (
    NotLogged,
    finished_run,
    log_cell,
    log_derived,
    log_folder,
    log_result,
    logged_run,
    push,
)
from layerbits.tracking.registry import register_checkpoint
from layerbits.tracking.session import PARENT_VARIABLE, RunSession, Terminated, parent_run, start_run
from layerbits.tracking.store import open_store
from layerbits.tracking.uris import redact

__all__ = [
    "PARENT_VARIABLE",
    "NotLogged",
    "RunSession",
    "Terminated",
    "finished_run",
    "log_cell",
    "log_derived",
    "log_folder",
    "log_result",
    "logged_run",
    "open_store",
    "parent_run",
    "push",
    "redact",
    "register_checkpoint",
    "start_run",
]
