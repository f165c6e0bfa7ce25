"""What several integration tests share."""

import os
import shutil
import sqlite3
import sys
from contextlib import closing, suppress

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.engine import Engine

from layerbits import tracking
from layerbits.tracking import store
from layerbits.tracking.uris import quoted_path


@pytest.fixture(autouse=True)
def no_run_stays_active():
    """A run that a test leaves active would become the parent of the next test's."""
    yield
    left = []
    while (run := mlflow.active_run()) is not None:
        left.append(run.info.run_id)
        with suppress(MlflowException):  # its store may be gone
            mlflow.end_run()
    assert not left, f"left active: {left}"


@pytest.fixture(scope="session", autouse=True)
def stores_are_made_once(tmp_path_factory):
    """Runs the many migrations of a new SQLite store once for all that this process makes; processes make their own.

    MLflow still opens each file by itself, with its own place of artifacts and its first experiment.
    """
    make = store._create_sqlite
    empty = []

    def copied(path):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        if not empty:
            file = tmp_path_factory.mktemp("migrated") / "mlflow.db"
            make(file)
            with closing(sqlite3.connect(file)) as database, database:
                database.execute("DELETE FROM experiments")
            empty.append(file)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        shutil.copyfile(empty[0], partial)
        SqlAlchemyStore(f"sqlite:///{quoted_path(partial)}", str(path.parent / "mlruns")).engine.dispose()
        partial.rename(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_create_sqlite", copied)
        yield


@pytest.fixture(scope="session", autouse=True)
def stores_wait_for_no_disk():
    """SQLite files of this process need not outlive a crash of the machine; waiting for the disk is half of logging."""

    def unsynced(connection, _record):
        if isinstance(connection, sqlite3.Connection):
            with suppress(sqlite3.DatabaseError):  # a file that is none; whoever uses it is to find that out
                connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", unsynced)
    yield
    event.remove(Engine, "connect", unsynced)


@pytest.fixture
def nobody_is_asked(monkeypatch, tmp_path):
    """Code that comes with a checkpoint goes to a folder of the test, and a question on the terminal fails it."""
    import transformers.dynamic_module_utils

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    yield
    forget()


@pytest.fixture(scope="session")
def made_store(tmp_path_factory):
    """A store as MLflow makes it, once: that takes two seconds; each test copies the file."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_store(None, folder)
        mlflow.set_tracking_uri(None)
    return folder / "mlflow.db"
