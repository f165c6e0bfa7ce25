"""Addresses of stores: which kind, where the UI is, and how to show one without its password."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def redact(text: str) -> str:
    """The text with passwords in URIs replaced by ``***``."""
    text = re.sub(r"(://[^\s/:@]*:)[^\s/]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret)=)[^&\s]+", r"\1***", text)


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Address of a run in the UI; for a database, in the UI that :func:`ui_command` opens."""
    # Without a workflow type MLflow 3.17 shows a run among its pages for GenAI.
    return f"{ui_address(uri)}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def ui_address(uri: str) -> str:
    """Address of the UI of a store; for a database, that of :func:`ui_command`."""
    return re.sub(r"://[^\s/]*@", "://", uri).rstrip("/") if is_server(uri) else "http://127.0.0.1:5000"


def ui_command(uri: str) -> str | None:
    """The command that opens the UI on a database; a server has its own."""
    return None if is_server(uri) else f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"


def is_server(uri: str) -> bool:
    """Whether the URI names a tracking server rather than a database."""
    return uri.startswith(("http://", "https://"))


def sqlite_database(uri: str) -> Path | None:
    """The file of a SQLite store; ``None`` for another store, or one without a file."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError:
        return None
    return Path(name) if name and name != ":memory:" else None


def quoted_path(path: Path) -> str:
    """The path as it stands in a database URI, where ``?`` ends it and ``%`` starts an escape."""
    return str(path).replace("%", "%25").replace("?", "%3F")
