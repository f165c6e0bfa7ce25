"""What a job made and the store did not take: locked stores, and ``push`` of every kind of result."""

import runpy
import sqlite3
import sys
import threading
import time

import mlflow
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from layerbits import tracking
from layerbits.errors import UserError
from layerbits.jobs import Tracker
from layerbits.tracking import process_watchdog, session, store
from layerbits.tracking.made import Data, Made, Measured, Registration
from layerbits.tracking.settings import TrackingSpec
from tests.integration.tracking_support import small_result, write_folder

KINDS = ("schemes", "probe", "validate", "verify", "serve_check", "export", "import", "recipe", "refine", "costs")


@pytest.fixture
def uri(made_store, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", tracking.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.0)
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    event.listen(Engine, "before_cursor_execute", without_patience, retval=True)
    yield tracking.open_store(None, tmp_path)
    event.remove(Engine, "before_cursor_execute", without_patience)
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(uri):
    return mlflow.MlflowClient(uri)


def tracker(uri, folder):
    return Tracker(TrackingSpec(True, uri, "layerbits", None, False), folder)


def without_patience(_connection, _cursor, statement, parameters, _context, _many):
    """MLflow has SQLite wait 20 seconds for a lock, which is long for a test."""
    return statement.replace("busy_timeout = 20000", "busy_timeout = 20"), parameters


class Lock:
    """The database locked by another process, for good or for some seconds."""

    def __init__(self, folder):
        self._other = sqlite3.connect(folder / "mlflow.db", check_same_thread=False)

    def take(self, seconds=1e6):
        self._other.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(seconds, self.release)
        timer.daemon = True
        timer.start()

    def release(self):
        self._other.rollback()


@pytest.fixture
def lock(uri, tmp_path):
    lock = Lock(tmp_path)
    yield lock
    lock.release()


def made(folder, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.md").write_text("it is so")
    return Made(folder, {"kl": 0.5}, {"eff.model": "tiny"}, {"source_run_id": "abc"}, **more)


def without_logging(tmp_path, kind, **more):
    """The folder of a job under ``tracking=none``."""
    untracked = Tracker(TrackingSpec(False, None, "layerbits", None, False), tmp_path)
    with untracked.run(f"a {kind}", kind) as run:
        run.log(made(tmp_path / kind, **more))
    return tmp_path / kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result_is_pushed_once(client, uri, tmp_path, kind):
    folder = without_logging(tmp_path, kind)
    run_id = tracking.push(folder, uri)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status, run.data.tags["layerbits.kind"]) == (f"a {kind}", "FINISHED", kind)
    assert (run.data.metrics["kl"], run.data.params["eff.model"], run.data.tags["outcome"]) == (0.5, "tiny", "ok")
    assert {file.path for file in client.list_artifacts(run_id)} == {"result.md", "run.json"}
    assert tracking.push(folder, uri) == run_id
    assert len(client.search_runs(["1"])) == 1


def test_pushed_schemes_are_logged_models_that_can_be_searched(client, uri, tmp_path):
    data = (Data({"name": "rows", "digest": "d", "source_type": "code", "source": "{}"}, "evaluation"),)
    for name, identity, gib, kl in (("a", "a1", 2.5, 0.02), ("b", "b1", 2.9, 0.01), ("c", "c1", 3.5, 0.001)):
        exported = Measured(
            f"tiny {name}", identity, ("kl",), values={"gib": gib}, tags={"checkpoint.path": f"/{name}"}
        )
        tracking.push(without_logging(tmp_path / name, "export", measured=(exported,)), uri)
        probed = Measured(f"tiny {name}", identity, (), "rows", {"probed_kl": kl})
        folder = without_logging(tmp_path / name, "probe", data=data, measured=(probed,))
        assert tracking.push(folder, uri) == tracking.push(folder, uri)
    best, other = client.search_logged_models(["1"], "metrics.gib < 3", order_by=[{"field_name": "metrics.probed_kl"}])
    assert [(one.name, one.tags["checkpoint.path"]) for one in (best, other)] == [("tiny b", "/b"), ("tiny a", "/a")]
    numbers = {metric.key: (metric.value, metric.dataset_name) for metric in best.metrics}
    assert numbers == {"kl": (0.5, None), "gib": (2.9, None), "probed_kl": (0.01, "rows")}


def test_a_check_that_failed_is_pushed_as_failed(client, uri, tmp_path):
    with pytest.raises(UserError):
        without_logging(tmp_path, "verify", failure=UserError("it differs"))
    run = client.get_run(tracking.push(tmp_path / "verify", uri))
    assert (run.info.status, run.data.tags["outcome"], run.data.tags["reason"]) == ("FAILED", "failed", "it differs")


def test_a_pushed_export_has_its_checkpoint_and_its_version(client, uri, tmp_path):
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "model.safetensors").write_bytes(b"x")
    registration = Registration("tiny", {"checkpoint.digest": "d"}, "checkpoint")
    job = Tracker(TrackingSpec(False, None, "layerbits", None, False), tmp_path)
    with job.run("export", "export") as run:
        artifacts = {"checkpoint": tmp_path / "fp8"}
        run.log(made(tmp_path / "fp8.report", artifacts=artifacts, registration=registration))
    run_id = tracking.push(tmp_path / "fp8", uri)  # the checkpoint's own folder
    assert [file.path for file in client.list_artifacts(run_id, "checkpoint")] == ["checkpoint/model.safetensors"]
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.source.endswith("/checkpoint")
    tracking.register_run(run_id, registration)
    assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_a_folder_without_a_result_is_refused(uri, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"neither a manifest.json nor a run.json"):
        tracking.push(tmp_path / "nothing", uri)


def test_a_store_that_is_locked_for_a_while_is_waited_for(uri, client, tmp_path, monkeypatch, capsys, lock):
    monkeypatch.setattr(store, "_LOCK_SECONDS", 60.0)
    with tracker(uri, tmp_path).run("a probe", "probe") as run:
        lock.take(seconds=2.0)
        run.log(made(tmp_path / "probe"))
    assert client.get_run(run.run_id).data.tags["outcome"] == "ok"
    assert "the store is locked by another process; waiting" in capsys.readouterr().err


def fail_to_log(tracker, kind, folder, lock):
    """A job that ends while its store is locked."""
    with tracker.run("a job", kind) as run:
        lock.take()
        if kind:
            run.log(made(folder))
        else:
            run.log_result(small_result(), write_folder(small_result(), folder))


@pytest.mark.parametrize("kind", ["", "probe"])
def test_a_store_that_stays_locked_leaves_a_command_and_no_running_run(uri, client, tmp_path, monkeypatch, lock, kind):
    closed = []
    monkeypatch.setattr(session, "close_later", lambda *arguments: closed.append(arguments))
    with pytest.raises(tracking.NotLogged) as failed:
        fail_to_log(tracker(uri, tmp_path), kind, tmp_path / "result", lock)
    lock.release()
    ((where, run_id, status, tags),) = closed
    assert (status, tags["outcome"]) == ("FAILED", "failed")
    assert f"layerbits push {tmp_path}/result --tracking-uri {uri} --run-id {run_id}" in str(failed.value)

    arguments = ["close", where, run_id, status, '{"outcome": "failed", "reason": "locked"}']
    monkeypatch.setattr(sys, "argv", [process_watchdog.__file__, *arguments])
    runpy.run_path(process_watchdog.__file__, run_name="__main__")
    assert client.get_run(run_id).info.status == "FAILED"
    assert tracking.push(tmp_path / "result", uri, run_id=run_id) == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"], "reason" in run.data.tags) == ("FINISHED", "ok", False)


def test_a_run_that_could_not_be_closed_is_closed_by_a_process_that_outlives_it(uri, client, tmp_path, monkeypatch):
    with tracker(uri, tmp_path).run("a job") as run:
        pass
    client.update_run(run.run_id, "RUNNING")
    process_watchdog.close_later(uri, run.run_id, "FAILED", {"outcome": "failed"})
    deadline = time.monotonic() + 60
    while client.get_run(run.run_id).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.get_run(run.run_id).info.status == "FAILED"


@pytest.mark.parametrize("first", ["the watchdog", "the push"])
def test_a_push_while_the_watchdog_writes_ends_the_run_as_the_result_says(uri, client, tmp_path, monkeypatch, first):
    with tracker(uri, tmp_path).run("a job") as run:
        pass
    client.update_run(run.run_id, "RUNNING")
    folder = write_folder(small_result(), tmp_path / "result")
    end = mlflow.MlflowClient.set_terminated

    def interrupted(self, run_id, status=None, end_time=None):
        monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", end)
        if first == "the watchdog":  # it has looked, and the push comes before it writes the status
            tracking.push(folder, uri, run_id=run_id)
            end(self, run_id, status, end_time)
        else:  # the watchdog had looked, and writes between the status and the tags of the push
            end(self, run_id, status, end_time)
            end(self, run_id, "FAILED")

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", interrupted)
    if first == "the watchdog":
        process_watchdog._close(uri, run.run_id, "FAILED", '{"outcome": "failed"}')
    else:
        tracking.push(folder, uri, run_id=run.run_id)
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.tags["outcome"]) == ("FINISHED", "ok")


def test_a_pushed_parent_ends_as_its_children_did(uri, client, tmp_path):
    job = tracker(uri, tmp_path)
    with job.parent("a grid") as parent:
        with job.run("a cell"):
            pass
        tracking.log_cell("another", "failed", "no")
        made(tmp_path / "grid").save(parent.name, parent.kind, parent.parent)
    assert tracking.push(tmp_path / "grid", uri, run_id=parent.run_id) == parent.run_id
    run = client.get_run(parent.run_id)
    assert (run.info.status, run.data.tags["outcome"], run.data.metrics["kl"]) == ("FAILED", "partial", 0.5)
