"""The ``layerbits`` command on real stores and servers, on a process that was killed, on what is no server."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlflow
import pytest

from layerbits import cli
from layerbits.results.assignment import Assignment
from tests.integration.tracking_support import Server, environment, small_result, write_folder

PAIRS = ("wint8_afp16", "wfp8_afp8")


def result(pair, seed=0, digest="d1" * 32):
    base = small_result(seed=seed)
    info = replace(base.candidate, name=pair, quant_pair=pair)
    assignment = Assignment(name and pair for name in base.allocation.assignment)
    return replace(
        base,
        candidate=info,
        allocation=replace(base.allocation, assignment=assignment),
        calibration=replace(base.calibration, digest=digest),
    )


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def store(made_store, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def layerbits(capsys):
    """Runs a command; returns (status, lines on stdout, lines on stderr)."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return exit.value.code, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.fixture
def pushed(store, tmp_path, layerbits):
    """Pair → id of its run, pushed by the command."""
    ids = {}
    for seed, pair in enumerate(PAIRS):
        status, out, _ = layerbits("push", write_folder(result(pair, seed), tmp_path / pair), "--tracking-uri", store)
        assert status == 0
        ids[pair] = re.search(r"/runs/(\w+)\?", out[0])[1]
    return ids


def test_push_prints_where_to_look(store, tmp_path, layerbits):
    folder = write_folder(result(PAIRS[0]), tmp_path / "one")
    status, out, err = layerbits("push", folder, "--tracking-uri", store)
    assert (status, err) == (0, [])
    logged, command, view = out
    assert re.fullmatch(
        r"logged: http://127.0.0.1:5000/#/experiments/\d+/runs/\w+\?workflowType=machine_learning", logged
    )
    assert command == f"open the UI with: mlflow ui --backend-store-uri {store}"
    assert view.startswith("compare runs: http://127.0.0.1:5000/#/experiments/")
    assert "viewStateShareKey" in view


def test_push_again_says_the_same_run_and_adds_none(store, tmp_path, layerbits):
    folder = write_folder(result(PAIRS[0]), tmp_path / "one")
    first = layerbits("push", folder, "--tracking-uri", store)
    assert layerbits("push", folder, "--tracking-uri", store, "--experiment", "another") == first
    client = mlflow.MlflowClient(store)
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 1


def test_view_prints_the_link_of_the_experiment(pushed, store, layerbits):
    experiment = mlflow.MlflowClient(store).get_experiment_by_name("layerbits").experiment_id
    status, out, _ = layerbits("view", "--port", "7000", "--tracking-uri", store)
    (line,) = out
    assert status == 0
    assert line.startswith(f"layerbits: http://127.0.0.1:7000/#/experiments/{experiment}/runs?")


def test_history_as_table_csv_and_json_tell_of_the_same_runs(pushed, store, layerbits):
    wanted = ["history", "--tracking-uri", store, "--pair", PAIRS[1]]
    status, table, _ = layerbits(*wanted)
    assert (status, len(table)) == (0, 2)
    assert table[1].split()[:4] == [pushed[PAIRS[1]], "tiny", PAIRS[1], "default"]
    _, lines, _ = layerbits(*wanted, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO("\n".join(lines)))
    _, lines, _ = layerbits(*wanted, "--format", "json")
    (found,) = json.loads("\n".join(lines))
    assert row["run_id"] == found["run_id"] == pushed[PAIRS[1]]
    assert float(row["score_sum"]) == found["score_sum"] == result(PAIRS[1], 1).total("scores")


def test_history_of_scores_has_a_line_per_group(pushed, store, layerbits):
    _, lines, _ = layerbits("history", "--scores", "--tracking-uri", store, "--pair", PAIRS[0], "--format", "csv")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    made = result(PAIRS[0])
    assert {row["layer"]: float(row["score"] or "inf") for row in rows} == {
        group.key: score for group, score in zip(made.groups, made.scores, strict=True)
    }


def test_compare_says_how_close_two_runs_are(pushed, store, layerbits):
    status, out, _ = layerbits("compare", *pushed.values(), "--tracking-uri", store)
    assert status == 0
    assert out[0].startswith("11 groups by predicted_kl: Spearman ")
    status, out, _ = layerbits("compare", *pushed.values(), "--tracking-uri", store, "--format", "json")
    found = json.loads("\n".join(out))
    assert (status, found["groups"], len(found["movers"])) == (0, 11, 11)


def test_compare_refuses_scores_of_another_calibration(pushed, store, tmp_path, layerbits):
    other = write_folder(result(PAIRS[0], 5, digest="e2" * 32), tmp_path / "other")
    _, out, _ = layerbits("push", other, "--tracking-uri", store)
    run_id = re.search(r"/runs/(\w+)\?", out[0])[1]
    status, out, err = layerbits("compare", pushed[PAIRS[0]], run_id, "--by", "score", "--tracking-uri", store)
    assert (status, out) == (1, [])
    assert any("not comparable by score: dataset digest" in line for line in err)


# Runs whose process is gone

JOB = """
import sys, time
from pathlib import Path
from layerbits import tracking
tracking.open_store(None, Path.cwd())
with tracking.start_run(sys.argv[1], system_metrics=False) as session:
    print(session.run_id, flush=True)
    time.sleep(300)
"""


def job(folder, name):
    """A process with an open run, and the run's id."""
    command = [sys.executable, "-c", JOB, name]
    process = subprocess.Popen(command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE)
    return process, process.stdout.readline().strip()


def test_reap_ends_the_run_of_a_killed_process_and_no_other(store, tmp_path, layerbits):
    (killed, gone), (alive, open_run) = job(tmp_path, "gone"), job(tmp_path, "alive")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        client = mlflow.MlflowClient(store)
        assert client.get_run(gone).info.status == "RUNNING"
        status, out, _ = layerbits("reap", "--tracking-uri", store)
        assert status == 0
        reason = f"process {killed.pid} on {os.uname().nodename} is gone"
        assert out == [f"killed: {gone} gone ({reason})", "1 runs closed"]
        run = client.get_run(gone)
        assert (run.info.status, run.data.tags["outcome"], run.data.tags["reason"]) == ("KILLED", "killed", reason)
        assert run.info.end_time == run.info.start_time  # it logged nothing since
        assert client.get_run(open_run).info.status == "RUNNING"
        assert layerbits("reap", "--tracking-uri", store)[1] == ["0 runs closed"]
    finally:
        alive.kill()
        alive.wait()


def test_reap_ends_a_run_that_had_told_its_outcome_as_that(store, tmp_path, layerbits):
    killed, run_id = job(tmp_path, "almost")
    killed.kill()
    killed.wait()
    client = mlflow.MlflowClient(store)
    client.set_tag(run_id, "outcome", "ok")  # what a result's logging writes last
    _, out, _ = layerbits("reap", "--tracking-uri", store)
    assert out[0].startswith(f"ok: {run_id} almost ")
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"], "reason" in run.data.tags) == ("FINISHED", "ok", False)


def test_reap_ends_a_run_of_another_machine_only_by_its_id(store, layerbits):
    client = mlflow.MlflowClient(store)
    unknown = client.create_run("0").info.run_id  # as `mlflow run` makes it, before its job has opened it
    assert layerbits("reap", "--tracking-uri", store)[1] == ["0 runs closed"]
    assert layerbits("reap", unknown, "--tracking-uri", store)[1][-1] == "1 runs closed"
    run = client.get_run(unknown)
    assert (run.info.status, run.data.tags["outcome"], run.data.tags["reason"]) == ("KILLED", "killed", "ended by hand")
    assert layerbits("reap", unknown, "--tracking-uri", store)[1] == ["0 runs closed"]


def test_reap_does_not_end_a_run_whose_process_is_there(store, tmp_path, layerbits):
    alive, run_id = job(tmp_path, "alive")
    try:
        status, _, errors = layerbits("reap", run_id, "--tracking-uri", store)
    finally:
        alive.kill()
        alive.wait()
    assert (status, errors[-1]) == (
        2,
        f"error: run {run_id} is held by a process of this machine; stop that instead",
    )


# The doctor


@pytest.fixture(scope="module")
def server(made_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "mlflow.db").write_bytes(made_store.read_bytes())
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def checks(lines):
    return {line.split()[1]: line.split()[0] for line in lines}


def test_doctor_finds_a_server_well_and_leaves_nothing_there(server, layerbits):
    status, out, err = layerbits("doctor", "--tracking-uri", server.url)
    assert (status, err) == (0, [])
    found = checks(out)
    assert list(found) == ["store", "versions", "artifacts", "clock", "disk", "gpu", "kernels", "serving"]
    assert [found[name] for name in ("store", "versions", "artifacts", "clock")] == ["ok"] * 4
    names = [experiment.name for experiment in mlflow.MlflowClient(server.url).search_experiments()]
    assert not [name for name in names if "doctor" in name]


def test_doctor_says_what_is_wrong_with_a_server_that_is_not_there(layerbits):
    begin = time.monotonic()
    status, out, _ = layerbits("doctor", "--tracking-uri", "http://127.0.0.1:9")
    assert time.monotonic() - begin < 60
    assert status == 1
    assert checks(out)["store"] == "fail"
    assert "does not answer within 4 s; start it" in out[0]
    assert list(checks(out)) == ["store", "disk", "gpu", "kernels", "serving"]


def test_doctor_on_a_store_of_its_own(store, tmp_path, layerbits):
    status, out, _ = layerbits("doctor", "--tracking-uri", store)
    assert status == 0
    assert checks(out)["artifacts"] == "ok"
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]


# Errors


@pytest.fixture
def shop():
    """A web server that is no tracking server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a shop</html>")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("command", [["history"], ["compare", "a", "b"], ["push", "DIR"], ["view"], ["reap"]])
@pytest.mark.parametrize(
    ("uri", "words"),
    [("http://127.0.0.1:9", "does not answer"), ("SHOP", "not as an MLflow server"), ("ftp://x", "no supported kind")],
)
def test_a_store_that_cannot_be_used_is_one_line(command, uri, words, shop, tmp_path, layerbits):
    folder = write_folder(result(PAIRS[0]), tmp_path / "one")
    arguments = [folder if part == "DIR" else part for part in command]
    status, out, err = layerbits(*arguments, "--tracking-uri", shop if uri == "SHOP" else uri)
    assert (status, out) == (2, [])
    (line,) = err
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["history", "--experiment", "layerbit"], "no experiment layerbit in"),
        (["history", "--where", "pair is nice"], "does not understand the filter"),
        (["history", "--since", "soon"], "is no date"),
        (["compare", "0" * 32, "1" * 32], "no run " + "0" * 32),
        (["push", "nowhere"], "no manifest"),
        (["push", "other"], "not a LayerBits manifest"),
        (["push", "later"], "upgrade layerbits"),
        (["push", "cut"], "is not JSON"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, words, pushed, store, tmp_path, layerbits):
    for name, text in (("other", '{"a": 1}'), ("later", '{"schema_version": 99}'), ("cut", '{"groups": [')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    status, out, err = layerbits(*arguments, "--tracking-uri", store)
    assert (status, out) == (2, [])
    (line,) = err
    assert line.startswith("error: ")
    assert words in line


def test_history_where_there_is_no_store_makes_none(tmp_path, layerbits):
    status, _, err = layerbits("history")
    assert status == 2
    assert err == [
        f"error: there are no runs at {tmp_path}/mlflow.db; give the tracking URI of the runs (tracking_uri=, "
        "--tracking-uri or MLFLOW_TRACKING_URI), or run a job first"
    ]
    assert not list(tmp_path.glob("*.db"))


def test_the_command_ends_quietly_when_its_reader_does(pushed, store, tmp_path):
    command = [sys.executable, "-c", "from layerbits.cli import main; main()", "history", "--tracking-uri", store]
    env = environment(PYTHONUNBUFFERED="")  # as usual: what is left is written at the end
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
