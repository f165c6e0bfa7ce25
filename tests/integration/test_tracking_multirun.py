"""``mlflow run`` and Hydra's multirun, with a job that does nothing but log."""

import os
import signal
import subprocess
import sys
import time

import mlflow
import pytest

from tests.integration.tracking_support import environment

JOB = """
import time
from pathlib import Path

import hydra
from layerbits import failures, tracking


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(cfg):
    if cfg.pair == "refused":
        failures.failed.append("pair=refused is not known")
        return
    tracking.open_store(cfg.tracking.uri, Path(__file__).parent)
    with tracking.start_run(f"pair {cfg.pair}", cfg.tracking.experiment, system_metrics=False):
        if cfg.pair == "slow":
            Path("started").touch()
            time.sleep(300)
        if cfg.pair == "bad":
            raise ValueError("no such pair")


main()
"""

CONFIG = """
pair: a
tracking: {enabled: true, uri: null, experiment: mine}
hydra:
  run: {dir: .}
  sweep: {dir: ., subdir: .}
  output_subdir: null
  callbacks: {parent: {_target_: layerbits.tracking.multirun.MultirunParent}}
"""

PROJECT = f"""
name: job
entry_points:
  main: {{parameters: {{pair: {{type: string}}}}, command: "{sys.executable} job.py pair={{pair}}"}}
  many: {{parameters: {{pairs: {{type: string}}}}, command: "{sys.executable} job.py -m pair={{pairs}}"}}
"""


@pytest.fixture
def project(tmp_path, made_store):
    for name, text in (("job.py", JOB), ("config.yaml", CONFIG), ("MLproject", PROJECT)):
        (tmp_path / name).write_text(text)
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    return tmp_path


@pytest.fixture
def client(project):
    return mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")


def run(project, *command, wait=True):
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if wait:
        process.output = process.communicate(timeout=240)[0]
    return process


def mlflow_run(project, *arguments, wait=True):
    return run(project, "-m", "mlflow", "run", ".", "--env-manager", "local", *arguments, wait=wait)


def runs(client):
    """Runs by name as (status, outcome, parent's name or None)."""
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    names = {run.info.run_id: run.info.run_name for run in found}
    return {
        run.info.run_name: (
            run.info.status,
            run.data.tags.get("outcome"),
            names.get(run.data.tags.get("mlflow.parentRunId")),
        )
        for run in found
    }


def test_a_multirun_is_a_parent_with_a_child_per_job(project, client):
    process = run(project, "job.py", "-m", "pair=a,b")
    assert process.returncode == 0, process.output
    assert runs(client) == {
        "multirun pair=a,b": ("FINISHED", "ok", None),
        "pair a": ("FINISHED", "ok", "multirun pair=a,b"),
        "pair b": ("FINISHED", "ok", "multirun pair=a,b"),
    }
    assert client.get_experiment_by_name("mine") is not None


def test_a_job_that_was_refused_before_it_had_a_run_fails_the_parent(project, client):
    run(project, "job.py", "-m", "pair=a,refused")
    assert runs(client) == {
        "multirun pair=a,refused": ("FAILED", "partial", None),
        "pair a": ("FINISHED", "ok", "multirun pair=a,refused"),
    }
    (parent,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id], "tags.outcome = 'partial'")
    assert parent.data.tags["reason"] == "pair=refused is not known"


def test_under_mlflow_run_the_parent_is_the_run_that_it_made(project, client):
    process = mlflow_run(project, "-e", "many", "-P", "pairs=a,bad", "--experiment-name", "chosen")
    assert process.returncode != 0
    assert runs(client) == {
        "multirun pair=a,bad": ("FAILED", "partial", None),
        "pair a": ("FINISHED", "ok", "multirun pair=a,bad"),
        "pair bad": ("FAILED", "failed", "multirun pair=a,bad"),
    }
    assert client.get_experiment_by_name("mine") is None


def test_ctrl_c_on_mlflow_run_ends_parent_and_child_as_killed(project, client):
    process = mlflow_run(project, "-e", "many", "-P", "pairs=slow,a", wait=False)
    until_started(project)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=240)
    killed = {
        "multirun pair=slow,a": ("KILLED", "killed", None),
        "pair slow": ("KILLED", "killed", "multirun pair=slow,a"),
    }
    until(client, killed)  # `mlflow run` writes FAILED first


def test_a_job_does_not_outlive_its_mlflow_run(project, client):
    process = mlflow_run(project, "-P", "pair=slow", wait=False)
    until_started(project)
    process.terminate()
    process.wait(timeout=60)
    until(client, {"pair slow": ("KILLED", "killed", None)})


def until_started(project):
    deadline = time.monotonic() + 120
    while not (project / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def until(client, expected):
    deadline = time.monotonic() + 60
    while runs(client) != expected:
        assert time.monotonic() < deadline, runs(client)
        time.sleep(0.2)


def test_an_unusable_store_ends_a_multirun_before_its_jobs(project, client):
    process = run(project, "job.py", "-m", "pair=a,b", "tracking.uri=http://127.0.0.1:9")
    assert process.returncode == 2
    assert "error: tracking store http://127.0.0.1:9 does not answer" in process.output
    assert runs(client) == {}
