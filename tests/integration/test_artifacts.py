"""Where artifacts go: a store that was moved, one that cannot be written, a server with a disk of its own."""

import shutil
import subprocess
import sys

import mlflow
import pytest

from layerbits import history, tracking
from layerbits.errors import UserError
from layerbits.tracking.artifacts import moved_experiments, relocate
from tests.integration.disks import mount
from tests.integration.tracking_support import Server, small_result, write_folder


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", tracking.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    yield
    mlflow.set_tracking_uri(None)


def pushed(made_store, folder):
    """A project folder with a run in it; its URI and the run's id."""
    folder.mkdir(exist_ok=True)
    shutil.copy(made_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    result = write_folder(small_result(), folder.parent / f"{folder.name}-result")
    return uri, tracking.push(result, uri)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_store_that_was_moved_is_refused_before_anything_is_scored_and_repaired(made_store, tmp_path, how):
    _, run_id = pushed(made_store, tmp_path / "before")
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "before", tmp_path / "now")
    uri = f"sqlite:///{tmp_path}/now/mlflow.db"
    with pytest.raises(UserError, match=f"layerbits relocate --tracking-uri {uri}"):
        tracking.open_store(uri, tmp_path)

    assert relocate(uri) >= 2  # the experiment and its run
    assert not moved_experiments(tmp_path / "now" / "mlflow.db")
    shutil.rmtree(tmp_path / "before", ignore_errors=True)
    tracking.open_store(uri, tmp_path)
    with tracking.start_run("new") as session:
        mlflow.log_text("a", "a.txt")
    for run in (run_id, session.run_id):
        assert f"{tmp_path}/now/mlruns/" in mlflow.MlflowClient().get_run(run).info.artifact_uri
    assert not (tmp_path / "before").exists()
    assert history.result(run_id, tracking_uri=uri).model.name == "tiny"


def test_artifacts_beside_a_moved_store_are_read(made_store, tmp_path):
    _, run_id = pushed(made_store, tmp_path / "before")
    shutil.move(tmp_path / "before", tmp_path / "now")
    assert history.result(run_id, tracking_uri=f"sqlite:///{tmp_path}/now/mlflow.db").model.name == "tiny"


def test_an_experiment_with_a_place_of_its_own_is_not_moved(made_store, tmp_path):
    uri, _ = pushed(made_store, tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    mlflow.MlflowClient(uri).create_experiment("own", f"{tmp_path}/elsewhere/mlruns/own")
    mlflow.MlflowClient(uri).create_experiment("cloud", "s3://bucket/mlruns/own")
    assert not moved_experiments(tmp_path / "project" / "mlflow.db")


@pytest.fixture
def read_only(tmp_path):
    """Makes a folder one that cannot be written; skips where nobody may."""
    bound = []

    def bind(folder):
        try:
            mount("--bind", folder, folder)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("nothing can be mounted here")
        bound.append(folder)
        mount("-o", "remount,bind,ro", folder)

    yield bind
    for folder in bound:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_store_in_a_read_only_folder_is_read(made_store, tmp_path, read_only, monkeypatch):
    uri, run_id = pushed(made_store, tmp_path / "project")
    read_only(tmp_path / "project")
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "project" / "cache"))  # that is no way out either
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="cannot keep runs"):
        assert list(history.runs(tracking_uri=uri)["run_id"]) == [run_id]
    assert history.result(run_id, tracking_uri=uri).model.name == "tiny"
    with pytest.raises(UserError, match="cannot be written"):
        tracking.open_store(uri, tmp_path)


class FolderServer(Server):
    """A server that tells its clients to write into a folder, on a disk that may be its own."""

    def __init__(self, store, artifacts, own_disk):
        super().__init__(store)
        self.artifacts = artifacts
        server = f"{sys.executable} -m mlflow server --port {self.port} --workers 1 --no-serve-artifacts "
        server += f"--backend-store-uri sqlite:///{store}/mlflow.db --default-artifact-root {artifacts}"
        hide = f"mount -t tmpfs tmpfs {artifacts} && " if own_disk else ""
        self.command = [*(["unshare", "--mount"] if own_disk else []), "sh", "-c", f"{hide}exec {server}"]


@pytest.fixture
def folder_server(tmp_path, made_store):
    started = []

    def start(own_disk):
        artifacts = tmp_path / "artifacts"
        artifacts.mkdir()
        if own_disk and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("no disk of its own can be given to a process here")
        shutil.copy(made_store, tmp_path / "mlflow.db")
        started.append(FolderServer(tmp_path, artifacts, own_disk))
        started[0].start()
        return started[0]

    yield start
    started[0].kill()


def test_a_server_with_artifacts_on_a_disk_of_its_own_is_refused(folder_server, tmp_path):
    server = folder_server(own_disk=True)
    tracking.open_store(server.url, tmp_path)
    with (
        pytest.raises(UserError, match=r"on a disk of its own.*--artifacts-destination"),
        tracking.start_run("x", "refused") as session,
    ):
        pytest.fail(f"{session.run_id} goes on")
    (run,) = mlflow.search_runs(experiment_names=["refused"], output_format="list")
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "failed")
    assert not list(server.artifacts.iterdir())


def test_a_server_with_artifacts_on_a_shared_disk_is_taken(folder_server, tmp_path):
    server = folder_server(own_disk=False)
    tracking.open_store(server.url, tmp_path)
    with tracking.start_run("x", "shared") as session:
        mlflow.log_text("a", "a.txt")
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(session.run_id)] == ["a.txt"]


def test_a_database_that_names_a_folder_of_another_machine_is_refused(made_store, tmp_path, monkeypatch):
    from layerbits.tracking import artifacts

    uri, run_id = pushed(made_store, tmp_path / "project")
    info = mlflow.MlflowClient(uri).get_run(run_id).info
    monkeypatch.setattr(artifacts, "sqlite_database", lambda _uri: None)
    artifacts.check_reachable("postgresql://db/x", info)
    shutil.move(tmp_path / "project", tmp_path / "gone")
    with pytest.raises(UserError, match="a folder of another machine"):
        artifacts.check_reachable("postgresql://db/x", info)
