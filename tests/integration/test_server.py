"""A team's server as docs/server.md has it: PostgreSQL, artifacts through the server, a browser, users."""

import base64
import json
import os
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from layerbits import history, tracking
from layerbits.errors import UserError
from layerbits.history import source
from layerbits.results.manifest import to_manifest
from layerbits.tracking.contract import SUMMARY, metrics
from layerbits.tracking.view import view_links
from tests.integration.servers import running_mlflow
from tests.integration.test_view import charts
from tests.integration.tracking_support import small_result, write_folder

pytest_plugins = ["tests.integration.servers"]

RUNS = 6
ADMIN = "a-password-of-a-test"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")) and name != "LAYERBITS_SCREENSHOTS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def logged(team_server, tmp_path_factory):
    """Run id → result, of runs that were logged over HTTP."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_store(team_server.url, tmp_path_factory.mktemp("nowhere"))
        for seed in range(RUNS):
            result = small_result(blocks=4, seed=seed)
            folder = write_folder(result, tmp_path_factory.mktemp("result"))
            with tracking.start_run(result.run_name, "team", system_metrics=False) as session:
                tracking.log_result(session, result, folder)
            runs[session.run_id] = result
        mlflow.set_tracking_uri(None)
    return runs


def test_every_value_of_every_run_is_in_postgresql(logged, team_server, tmp_path):
    client = mlflow.MlflowClient(team_server.url)
    for run_id, result in logged.items():
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")
        points = metrics(result)
        assert {key: run.data.metrics[key] for key, _, _ in points} == {key: value for key, value, _ in points}
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        manifest = json.loads(Path(client.download_artifacts(run_id, "manifest.json", str(tmp_path))).read_text())
        assert manifest == json.loads(json.dumps(to_manifest(result)))


def test_history_reads_them_back_exactly(logged, team_server):
    runs = history.runs("team", tracking_uri=team_server.url)
    assert set(runs["run_id"]) == set(logged)
    scores = history.scores(runs).set_index(["run_id", "layer"])["score"]
    for run_id, result in logged.items():
        made = np.where(np.isfinite(result.scores), result.scores, np.nan)
        np.testing.assert_array_equal(scores[run_id][[group.key for group in result.groups]], made)


def test_the_server_and_its_database_tell_the_same(logged, team_server, postgres):
    over_http = history.runs("team", tracking_uri=team_server.url)
    direct = history.runs("team", tracking_uri=postgres.uri("mlflow"))
    pd.testing.assert_frame_equal(over_http, direct)
    pd.testing.assert_frame_equal(history.scores(over_http), history.scores(direct))


def test_history_has_the_server_leave_out_the_metrics(logged, team_server, monkeypatch):
    whole = history.runs("team", tracking_uri=team_server.url, refresh=True)
    monkeypatch.setattr(source, "_whole_page", None)
    light = history.runs("team", tracking_uri=team_server.url, refresh=True)
    monkeypatch.undo()
    monkeypatch.setattr(source, "_GRAPHQL", "/no-such-page")
    pd.testing.assert_frame_equal(light, history.runs("team", tracking_uri=team_server.url, refresh=True))
    pd.testing.assert_frame_equal(light, whole)


def test_runs_of_before_the_summary_tag_are_read_with_their_metrics(team_server, tmp_path):
    tracking.open_store(team_server.url, tmp_path)
    client = mlflow.MlflowClient()
    ids = [tracking.push(write_folder(small_result(seed=i), tmp_path / str(i)), experiment="old") for i in (20, 21)]
    client.delete_tag(ids[0], SUMMARY)
    runs = history.runs("old", tracking_uri=team_server.url).set_index("run_id")
    for run_id, seed in zip(ids, (20, 21), strict=True):
        assert runs.loc[run_id, "score_sum"] == small_result(seed=seed).total("scores")


def test_runs_without_a_result_are_read_too(team_server, tmp_path):
    tracking.open_store(team_server.url, tmp_path)
    cell = tracking.log_cell("a cell's own name", "unsupported", "needs CUDA", experiment="cells")
    runs = history.runs("cells", tracking_uri=team_server.url, outcome=None)
    assert list(runs[["run_id", "outcome", "reason"]].iloc[0]) == [cell, "unsupported", "needs CUDA"]
    assert history.runs("cells", tracking_uri=team_server.url).empty


def test_an_alias_is_recorded_once_whatever_its_name(team_server, tmp_path):
    tracking.open_store(team_server.url, tmp_path)
    names = ("o'brien", 'say "hello"', "both ' and \"")

    def record(name, overlay):
        how = {"experiment": "aliases", "alias_of": "0" * 32, "params": {"eff.granularity": str(overlay)}}
        return tracking.log_cell(name, "skipped", "same", **how)

    first = [record(name, overlay) for overlay, name in enumerate(names)]
    again = [record(f"{name} again", overlay) for overlay, name in enumerate(names)]
    assert first == again
    assert len(set(first)) == len(names)


def test_the_saved_view_opens_with_a_line_per_run(logged, team_server, page, shoot):
    page.goto(view_links(mlflow.MlflowClient(team_server.url), team_server.url)["team"])
    found = charts(page, 6)
    shoot("postgresql")
    assert [len(chart["lines"]) for chart in found[:4]] == [RUNS] * 4


def test_a_database_that_is_gone_says_so_within_seconds(postgres):
    with pytest.raises(UserError, match="does not take a connection"):
        history.runs("team", tracking_uri=postgres.uri("nowhere"))


# Users


@pytest.fixture(scope="module")
def guarded(postgres, tmp_path_factory):
    """A server that asks who one is, with the user ann."""
    folder = tmp_path_factory.mktemp("guarded")
    database = postgres.database("guarded")
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n"
    )
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN, "MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef"}
    config = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini")}
    with running_mlflow(folder, database, "--app-name", "basic-auth", **secrets, **config) as server:
        ask(server, "2.0/mlflow/users/create", username="ann", password="a-password-of-ann")
        yield server


def ask(server, path, **body):
    """As the admin."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/api/{path}", data, {"Content-Type": "application/json"})
    request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{ADMIN}".encode()).decode())
    urllib.request.urlopen(request).close()


def log_in(monkeypatch, name, password):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def test_who_may_and_who_may_not(guarded, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="refuses us; set MLFLOW_TRACKING_USERNAME"):
        tracking.open_store(guarded.url, tmp_path)
    log_in(monkeypatch, "admin", ADMIN)
    run_id = tracking.push(write_folder(small_result(), tmp_path / "one"), guarded.url, "admins")
    log_in(monkeypatch, "ann", "a-password-of-ann")
    assert list(history.runs("admins", tracking_uri=guarded.url)["run_id"]) == [run_id]
    other = write_folder(small_result(seed=1), tmp_path / "two")
    with pytest.raises(UserError, match="refuses us; ask its owner for EDIT permission"):
        tracking.push(other, guarded.url, "admins")
    assert tracking.push(other, guarded.url, "anns own")
    experiment = mlflow.MlflowClient(guarded.url).get_experiment_by_name("admins").experiment_id
    deny = {"username": "ann", "resource_type": "experiment", "resource_id": experiment, "permission": "DENY"}
    ask(guarded, "3.0/mlflow/users/permissions/grant", **deny)
    with pytest.raises(UserError, match="refuses us; ask its owner for READ permission"):
        history.runs("admins", tracking_uri=guarded.url)
