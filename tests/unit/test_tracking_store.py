"""URIs, links and endings: the parts of tracking that need no store."""

import signal

import pytest

from layerbits.errors import Unsupported, UserError
from layerbits.tracking.session import Ending, Terminated, ending_of
from layerbits.tracking.store import one_line
from layerbits.tracking.uris import redact, run_link, ui_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@db:5432/x failed", "postgresql://me:***@db:5432/x failed"),
        ("https://me:s3c@ret@host/path", "https://me:***@host/path"),
        ("mysql://db/x?user=me&password=s3cret&ssl=1", "mysql://db/x?user=me&password=***&ssl=1"),
        ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
    ],
)
def test_redact(text, shown):
    assert redact(text) == shown


def test_link_on_a_server_carries_no_user():
    assert (
        run_link("https://me:pw@host:8080/mlflow/", "3", "abc")
        == "https://host:8080/mlflow/#/experiments/3/runs/abc?workflowType=machine_learning"
    )


def test_a_local_store_has_a_link_on_the_default_port_and_a_command_that_a_shell_takes():
    uri = "sqlite:////data/my project/mlflow.db"
    assert run_link(uri, "3", "abc") == "http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    assert ui_command(uri) == "mlflow ui --backend-store-uri 'sqlite:////data/my project/mlflow.db'"


def test_a_server_needs_no_command():
    assert ui_command("http://127.0.0.1:5000") is None


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (ValueError("bad\nthing"), Ending("FAILED", "failed", "ValueError: bad")),
        (UserError("no such pair; use another"), Ending("FAILED", "failed", "no such pair; use another")),
        (Unsupported("needs CUDA"), Ending("FAILED", "unsupported", "needs CUDA")),
        (KeyboardInterrupt(), Ending("KILLED", "killed", "interrupted from the keyboard")),
        (Terminated(128 + signal.SIGTERM), Ending("KILLED", "killed", "stopped by SIGTERM")),
        (SystemExit(0), Ending("FINISHED", "ok")),
        (SystemExit(2), Ending("FAILED", "failed", "exit status 2")),
        (
            OSError("huggingface.co: Max retries exceeded"),
            Ending("FAILED", "failed", "OSError: huggingface.co: Max retries exceeded"),
        ),
        (MemoryError(), Ending("FAILED", "failed", "MemoryError")),
        (RuntimeError("at http://me:pw@host"), Ending("FAILED", "failed", "RuntimeError: at http://me:***@host")),
    ],
)
def test_ending_follows_the_exception(error, ending):
    assert ending_of(error) == ending


def test_a_reason_keeps_the_cause_behind_its_figures():
    assert one_line(UserError("x" * 1500)) == "x" * 1500
