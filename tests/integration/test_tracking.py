"""Runs on a real SQLite store: what they hold, how they end, who their parent is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from layerbits import progress, tracking
from layerbits.errors import Unsupported, UserError
from layerbits.tracking.contract import RESULT_ID, TABLE, milliseconds
from tests.integration.tracking_support import environment, small_result, write_folder

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from layerbits import tracking
from layerbits.errors import UserError
tracking.open_store(None, Path.cwd())
"""


@pytest.fixture
def store(made_store, tmp_path, monkeypatch):
    """A store of this test's own, opened."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    yield tracking.open_store(None, tmp_path)
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(store):
    return mlflow.MlflowClient(store)


@pytest.fixture
def folder(tmp_path):
    return write_folder(small_result(), tmp_path / "result")


def start(code, cwd, **env):
    command = [sys.executable, "-c", PREAMBLE + code]
    return subprocess.Popen(command, cwd=cwd, env=environment(**env), text=True, stdout=subprocess.PIPE)


def only_run(client):
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


def end(client, run_id):
    run = client.get_run(run_id)
    return run.info.status, run.data.tags.get("outcome"), run.data.tags.get("reason")


# What a result leaves


def test_everything_logged_reads_back(client, folder):
    result = small_result()
    with tracking.start_run(result.run_name, system_metrics=False) as session:
        tracking.log_result(session, result, folder)
    run = client.get_run(session.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "layerbits"
    assert run.info.run_name == "wint8_afp16 small default tiny"
    assert run.data.params["eff.quant_pair"] == "wint8_afp16"
    assert run.data.metrics["score/B02.down"] == result.scores[11]
    assert run.data.metrics["summary/nonfinite"] == 1
    assert run.data.metrics["seconds/log"] > 0
    assert run.data.tags["version.torch"] == "2.13.0"
    assert end(client, session.run_id) == ("FINISHED", "ok", None)
    (captions,) = run.inputs.dataset_inputs
    assert (captions.dataset.name, captions.dataset.digest) == ("everyday-small", ("d1" * 32)[:36])
    assert mlflow.data.get_source(captions.dataset).to_dict()["tags"]["digest"] == "d1" * 32
    files = {
        item.path
        for top in ("", "figures", "report", "sensitivity")
        for item in client.list_artifacts(run.info.run_id, top)
    }
    assert files >= {"manifest.json", "figures/heatmap.png", "report/layer-sensitivity-report.md", TABLE}


def test_captions_that_another_run_brought_at_the_same_moment_are_logged(client, folder, monkeypatch):
    log_inputs = mlflow.MlflowClient.log_inputs

    def refused_once(self, *arguments):
        monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", log_inputs)
        raise MlflowException('duplicate key value violates unique constraint "dataset_pk"', BAD_REQUEST)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", refused_once)
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, small_result(), folder)
    assert len(client.get_run(session.run_id).inputs.dataset_inputs) == 1


def test_lines_read_back_with_the_block_as_step(client, folder):
    result = small_result()
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, result, folder)
    points = client.get_metric_history(session.run_id, "score_by_layer/gate_up")
    assert [(p.step, p.value) for p in points] == [(b, result.scores[4 * b + 2]) for b in range(3)]


def test_table_loads_as_mlflow_loads_tables(client, folder):
    result = small_result()
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, result, folder)
    table = client.load_table(session.experiment_id, TABLE, run_ids=[session.run_id]).set_index("layer")
    finite = [g for g in result.groups if g.key != "B01.o"]
    expected = result.scores[np.isfinite(result.scores)]
    np.testing.assert_allclose([table.loc[g.key, "score"] for g in finite], expected, rtol=1e-12)


def test_logging_again_to_the_same_run_changes_nothing(client, folder):
    result = small_result()
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, result, folder)
        tracking.log_result(session, result, folder)
    assert len(client.get_metric_history(session.run_id, "score_by_layer/down")) == 3
    assert len(client.get_metric_history(session.run_id, "summary/score_sum")) == 1
    table = json.loads(Path(client.download_artifacts(session.run_id, TABLE)).read_text())
    assert len(table["data"]) == 12
    assert len(client.get_run(session.run_id).inputs.dataset_inputs) == 1


def test_artifacts_of_a_local_store_lie_beside_it(client, folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, small_result(), folder)
    assert (tmp_path / "mlruns" / "layerbits" / session.run_id / "artifacts" / "manifest.json").is_file()


def test_system_metrics_are_sampled_and_the_run_ends_at_once(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with tracking.start_run("x") as session:
        time.sleep(1)
        ending = time.monotonic()
    assert time.monotonic() - ending < 8  # of which most is for a busy machine
    assert any(key.startswith("system/") for key in client.get_run(session.run_id).data.metrics)


def test_a_run_prints_its_link_and_how_to_open_the_ui(store, tmp_path, capsys):
    with tracking.start_run("x", system_metrics=False) as session:
        pass
    out = capsys.readouterr().out
    assert f"http://127.0.0.1:5000/#/experiments/{session.experiment_id}/runs/{session.run_id}" in out
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in out


# How a run ends


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (RuntimeError("no memory"), ("FAILED", "failed", "RuntimeError: no memory")),
        (UserError("no such pair"), ("FAILED", "failed", "no such pair")),
        (Unsupported("needs CUDA"), ("FAILED", "unsupported", "needs CUDA")),
        (KeyboardInterrupt(), ("KILLED", "killed", "interrupted from the keyboard")),
        (SystemExit(3), ("FAILED", "failed", "exit status 3")),
    ],
)
def test_a_run_ends_as_what_happened(client, error, ended):
    with pytest.raises(type(error)), tracking.start_run("x", system_metrics=False) as session:
        raise error
    assert end(client, session.run_id) == ended


WAITING = """
with tracking.start_run("x") as session:
    print("open", flush=True)
    time.sleep(300)
"""


def test_sigterm_ends_a_run_as_killed(client, tmp_path):
    process = start(WAITING, tmp_path)
    assert process.stdout.readline() == "open\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert end(client, only_run(client).info.run_id) == ("KILLED", "killed", "stopped by SIGTERM")


def test_ctrl_c_followed_by_sigterm_as_from_mlflow_run_ends_a_run_as_killed(client, tmp_path):
    process = start(WAITING, tmp_path)
    assert process.stdout.readline() == "open\n"
    process.send_signal(signal.SIGINT)
    for _ in range(40):  # at every moment of the closing
        time.sleep(0.003)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    status, outcome, _ = end(client, only_run(client).info.run_id)
    assert (status, outcome) == ("KILLED", "killed")


def test_signal_handlers_are_put_back(store):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with tracking.start_run("x", system_metrics=False):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


# Whose run it is


def test_the_run_of_mlflow_run_is_resumed_and_gets_our_name(client, monkeypatch):
    made = client.create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with tracking.start_run("ours", system_metrics=False) as session:
        assert session.resumed
        assert mlflow.active_run().info.run_id == made.info.run_id
    run = only_run(client)
    assert (run.info.run_id, run.info.run_name) == (made.info.run_id, "ours")
    assert end(client, run.info.run_id) == ("FINISHED", "ok", None)


def test_a_run_name_that_the_user_gave_stays(client, monkeypatch):
    made = client.create_run("0", tags={"mlflow.runName": "nightly-7"})
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with tracking.start_run("ours", system_metrics=False):
        pass
    assert only_run(client).info.run_name == "nightly-7"


def test_the_second_run_of_a_process_is_its_own(client, monkeypatch):
    made = client.create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with tracking.start_run("first", system_metrics=False):
        pass
    with tracking.start_run("second", system_metrics=False) as session:
        assert session.run_id != made.info.run_id


def test_a_run_of_another_store_says_so(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match="same store"), tracking.start_run("x"):
        pass


def test_a_deleted_experiment_says_how_to_restore_it(client):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match="mlflow experiments restore"), tracking.start_run("x", experiment="gone"):
        pass


@pytest.mark.parametrize(
    ("children", "ended"),
    [
        (["ok", "ok"], ("FINISHED", "ok", None)),
        (["ok", "unsupported"], ("FINISHED", "ok", None)),
        (["ok", "failed"], ("FAILED", "partial", "1 of 2 child runs failed")),
        (["failed", "unsupported"], ("FAILED", "failed", "no child run succeeded")),
        ([], ("FAILED", "failed", "no child run succeeded")),
    ],
)
def test_a_parent_ends_as_its_children_did(client, children, ended):
    raised = {"ok": None, "failed": RuntimeError, "unsupported": Unsupported}
    with tracking.parent_run("sweep") as parent:
        for outcome in children:
            try:
                with tracking.start_run(outcome, system_metrics=False) as child:
                    if raised[outcome]:
                        raise raised[outcome]("no")
            except (RuntimeError, Unsupported):
                pass
            tags = client.get_run(child.run_id).data.tags
            assert tags["mlflow.parentRunId"] == parent.run_id
    assert end(client, parent.run_id) == ended
    tags = client.get_run(parent.run_id).data.tags
    counted = {o: tags[f"children.{o}"] for o in raised if f"children.{o}" in tags}
    assert counted == {o: str(children.count(o)) for o in set(children)}
    assert tracking.PARENT_VARIABLE not in os.environ


def test_a_cell_without_a_result_is_a_run_that_says_why(client):
    with tracking.parent_run("grid") as parent:
        first = tracking.log_cell("a", "unsupported", "needs\nCUDA", params={"eff.quant_pair": "wfp4_afp8"})
        alias = tracking.log_cell("b", "skipped", "same as a", alias_of=first)
    assert end(client, first) == ("FAILED", "unsupported", "needs CUDA")
    assert end(client, alias) == ("FINISHED", "skipped", "same as a")
    run = client.get_run(alias)
    assert (run.data.tags["alias_of"], run.data.tags["mlflow.parentRunId"]) == (first, parent.run_id)
    assert client.get_run(first).data.params == {"eff.quant_pair": "wfp4_afp8"}


# Pushing


def test_push_logs_once(client, folder, tmp_path):
    run_id = tracking.push(folder, root=tmp_path)
    assert tracking.push(folder, root=tmp_path) == run_id
    run = only_run(client)
    assert (run.info.run_id, run.info.status, run.info.run_name) == (
        run_id,
        "FINISHED",
        "wint8_afp16 small default tiny",
    )
    assert run.data.tags[RESULT_ID]
    made = milliseconds(small_result())
    assert (run.info.start_time, run.info.end_time) == (made - 3500, made)


def test_push_finds_the_run_of_the_job(client, folder, tmp_path):
    with tracking.start_run("x", system_metrics=False) as session:
        tracking.log_result(session, small_result(), folder)
    assert tracking.push(folder, root=tmp_path) == session.run_id


def test_push_completes_the_run_that_the_job_had_opened(client, folder, tmp_path):
    with pytest.raises(RuntimeError), tracking.start_run("x", system_metrics=False) as session:
        raise RuntimeError("server gone")
    assert tracking.push(folder, root=tmp_path, run_id=session.run_id) == session.run_id
    assert end(client, session.run_id) == ("FINISHED", "ok", None)
    assert "score/B00.qkv" in only_run(client).data.metrics


def test_push_of_something_else_says_so(store, tmp_path):
    with pytest.raises(UserError, match="no manifest"):
        tracking.push(tmp_path / "nothing", root=tmp_path)


# Stores


def test_several_processes_start_at_once_on_a_fresh_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = """
import mlflow
with tracking.start_run("x", experiment="shared", system_metrics=False):
    mlflow.log_metrics({f"m{i}": i for i in range(20)})
"""
    processes = [start(code, tmp_path) for _ in range(3)]
    assert [process.wait(timeout=240) for process in processes] == [0] * 3
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("shared").experiment_id])
    assert [(run.info.status, len(run.data.metrics)) for run in runs] == [("FINISHED", 20)] * 3
    assert not list(tmp_path.glob(".*.partial"))


def test_a_store_in_a_folder_with_an_odd_name(tmp_path, monkeypatch, made_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    odd = tmp_path / "100% mine?"
    odd.mkdir()
    (odd / "mlflow.db").write_bytes(made_store.read_bytes())
    before = (odd / "mlflow.db").stat().st_mtime_ns
    uri = tracking.open_store(None, odd)
    with tracking.start_run("x", system_metrics=False) as session:
        pass
    mlflow.set_tracking_uri(None)
    assert (odd / "mlflow.db").stat().st_mtime_ns > before
    assert mlflow.MlflowClient(uri).get_run(session.run_id).info.status == "FINISHED"


def test_a_relative_sqlite_uri_is_made_absolute(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        tracking.open_store("sqlite:///mlflow.db?timeout=9", Path("/nowhere"))
        == f"sqlite:///{tmp_path}/mlflow.db?timeout=9"
    )


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("sqlite://", "keeps nothing"),
        ("sqlite:////proc/nowhere/mlflow.db", "cannot be written"),
        ("ftp://host/x", "no supported kind"),
        ("localhost:5000", "http\\(s\\)://server:port"),
        ("http://127.0.0.1:9", "tracking=none"),
        ("http://[::1", "no address"),
    ],
)
def test_a_store_that_cannot_be_used_says_the_mend_within_seconds(uri, advice, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    begin = time.monotonic()
    with pytest.raises(UserError, match=advice):
        tracking.open_store(uri, tmp_path)
    assert time.monotonic() - begin < 30  # MLflow alone: minutes


def test_a_file_that_is_no_database_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "mlflow.db").write_text("precious notes, no database " * 100)
    with pytest.raises(UserError, match="not a database"):
        tracking.open_store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    assert (tmp_path / "mlflow.db").read_text().startswith("precious")


def test_progress_is_in_the_store_while_the_run_goes_on(store, client, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    with tracking.start_run("long", system_metrics=False) as session:
        for step in progress.progress(range(4), "scoring"):
            if step == 3:
                deadline = time.monotonic() + 60
                while not (seen := client.get_run(session.run_id).data.metrics) and time.monotonic() < deadline:
                    time.sleep(0.05)
    assert 1 <= seen["progress/steps"] <= 3
    assert seen["progress/percent"] == 25 * seen["progress/steps"]
    assert seen["progress/eta_seconds"] >= 0


def test_a_store_that_takes_no_progress_does_not_stop_the_run(store, client, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", _refuse_metrics(mlflow.MlflowClient.log_batch))
    with tracking.start_run("long", system_metrics=False):
        assert list(progress.progress(range(3), "scoring")) == [0, 1, 2]
    assert only_run(client).info.status == "FINISHED"


def _refuse_metrics(log_batch):
    def refusing(self, run_id, metrics=(), **others):
        if metrics:
            raise mlflow.MlflowException("planted")
        return log_batch(self, run_id, metrics=metrics, **others)

    return refusing
