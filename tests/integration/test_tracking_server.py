"""The same over HTTP, to a real server that also goes away."""

import base64
import http.server
import json
import os
import threading
import time
import urllib.request

import mlflow
import pytest

from layerbits import tracking
from layerbits.errors import UserError
from layerbits.tracking.contract import RESULT_ID, result_id
from tests.integration.tracking_support import Server, small_result, write_folder


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with an embedded store, which the server serves as ``mlflow ui`` would."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_store(None, folder)
        mlflow.set_tracking_uri(None)
    return folder


@pytest.fixture(scope="module")
def server(local):
    server = Server(local)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def folder(tmp_path):
    return write_folder(small_result(), tmp_path / "result")


def test_a_result_logged_over_http_reads_back(server, folder, capsys):
    result = small_result()
    tracking.open_store(server.url, folder)
    with tracking.start_run("over http", experiment="remote", system_metrics=False) as session:
        tracking.log_result(session, result, folder)
    client = mlflow.MlflowClient(server.url)
    run = client.get_run(session.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.data.metrics["score/B00.qkv"] == result.scores[0]
    assert len(client.get_metric_history(session.run_id, "predicted_kl_by_layer/down")) == 3
    manifest = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/manifest.json")
    assert manifest["schema_version"] == 1
    assert session.link in capsys.readouterr().out


def test_the_ui_on_a_local_store_serves_its_artifacts(server, local, folder):
    run_id = tracking.push(folder, root=local)
    with urllib.request.urlopen(f"{server.url}/get-artifact?run_uuid={run_id}&path=manifest.json") as answer:
        assert json.load(answer)["model"]["name"] == "tiny"


def test_push_over_http_logs_once(server, tmp_path):
    folder = write_folder(small_result(seed=7), tmp_path / "other")
    run_id = tracking.push(folder, server.url, experiment="pushed")
    assert tracking.push(folder, server.url, experiment="another") == run_id


def test_a_result_survives_a_server_that_goes_away(server, tmp_path):
    result = small_result(seed=8)
    folder = write_folder(result, tmp_path / "result")
    tracking.open_store(server.url, tmp_path)
    opened = []

    def job():
        with tracking.start_run("x") as session:
            opened.append(session.run_id)
            server.kill()
            tracking.log_result(session, result, folder)

    begin = time.monotonic()
    try:
        with pytest.raises(tracking.NotLogged) as failure:
            job()
        took = time.monotonic() - begin
    finally:
        server.start()
    assert took < 90  # MLflow alone: 246 s for the first request
    command = f"layerbits push {folder} --tracking-uri {server.url} --run-id {opened[0]}"
    assert str(failure.value).endswith(command)
    assert tracking.push(folder, server.url, run_id=opened[0]) == opened[0]
    run = mlflow.MlflowClient(server.url).get_run(opened[0])
    assert (run.info.status, run.data.tags["outcome"], len(run.data.params)) == ("FINISHED", "ok", 23)


@pytest.fixture
def web():
    """A web server that keeps what it was asked and answers with ``web.status`` and ``web.body``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            web.asked.append(self.headers.get("Authorization"))
            self.send_response(web.status)
            self.end_headers()
            self.wfile.write(web.body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.asked, web.status, web.body = [], 200, b'{"experiments": []}'
    web.at = f"127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield web
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (200, b"<html>a shop</html>", "not as an MLflow server"),
        (404, b"nothing here", "not as an MLflow server"),
        (401, b"who are you", "MLFLOW_TRACKING_USERNAME"),
        (403, b"not you", "MLFLOW_TRACKING_USERNAME"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (503, b"later", "error 503"),
    ],
)
def test_an_answer_that_is_no_welcome_says_the_mend(web, status, body, advice, tmp_path):
    web.status, web.body = status, body
    with pytest.raises(UserError, match=advice):
        tracking.open_store(f"http://{web.at}", tmp_path)


def test_a_password_in_the_uri_is_used_and_not_kept_in_it(web, tmp_path):
    assert tracking.open_store(f"http://me:s3%40cret@{web.at}", tmp_path) == f"http://{web.at}"
    assert web.asked == [f"Basic {base64.b64encode(b'me:s3@cret').decode()}"]
    assert mlflow.get_tracking_uri() == f"http://{web.at}"


def test_a_server_that_hangs_is_given_up_within_seconds(tmp_path):
    silent = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # never served
    begin = time.monotonic()
    with silent, pytest.raises(UserError, match="does not answer within 4 s"):
        tracking.open_store(f"http://127.0.0.1:{silent.server_port}", tmp_path)
    assert time.monotonic() - begin < 30


def test_a_result_that_is_pushed_later_is_logged_as_it_would_have_been(server, tmp_path):
    result = small_result(seed=9)
    folder = write_folder(result, tmp_path / "result")
    tracking.open_store(server.url, tmp_path)
    client = mlflow.MlflowClient(server.url)
    with tracking.start_run("the run", experiment="direct", system_metrics=False) as direct:
        tracking.log_result(direct, result, folder)
    stopped = []

    def job():
        with tracking.start_run("the run", experiment="later", system_metrics=False) as session:
            stopped.append(session.run_id)
            server.kill()
            tracking.log_result(session, result, folder)

    try:
        with pytest.raises(tracking.NotLogged):
            job()
    finally:
        server.start()
    # As a result it is there already; somebody else's store would not have it.
    client.delete_tag(direct.run_id, RESULT_ID)
    assert tracking.push(folder, server.url, run_id=stopped[0]) == stopped[0]
    client.set_tag(direct.run_id, RESULT_ID, result_id(folder))
    assert everything(client, stopped[0], tmp_path / "b") == everything(client, direct.run_id, tmp_path / "a")


def everything(client, run_id, folder):
    """All that a run has, but for what is of its own: ids, times, the seconds that logging took."""
    run = client.get_run(run_id)
    points = {key: client.get_metric_history(run_id, key) for key in run.data.metrics if key != "seconds/log"}
    folder.mkdir()
    client.download_artifacts(run_id, "", str(folder))
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "metrics": {key: [(p.step, p.value, p.timestamp) for p in line] for key, line in points.items()},
        "tags": run.data.tags,
        "datasets": [item.to_dictionary() for item in run.inputs.dataset_inputs],
        "files": {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()},
    }
