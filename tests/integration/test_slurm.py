"""Multirun on a real Slurm: one parent with a child a job, whatever becomes of the jobs."""

import re
import sys
import time

import mlflow
import pytest

from tests.integration.tracking_support import finished, started

pytest.importorskip("submitit")
pytest_plugins = ["tests.integration.slurm"]

JOB = """
import os, signal, time
from pathlib import Path

from layerbits import entry, tracking
from layerbits.errors import UserError

HERE = Path(__file__).resolve().parent.parent


def main(config, root):
    tracking.open_store(config["tracking"]["uri"], root)
    with tracking.start_run(f"pair {config['pair']}", config["tracking"]["experiment"], system_metrics=False):
        work(config["pair"])


def work(pair):
    if pair == "bad":
        raise UserError("no such pair; name another")
    if pair == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if pair == "slow":
        with (HERE / "starts").open("a") as starts:
            starts.write("x")
        while not (HERE / "go").exists():
            time.sleep(0.1)


if __name__ == "__main__":
    entry.start(main, __file__, "config")
"""

CONFIG = """
pair: a
output_root: {folder}
tracking: {{enabled: true, uri: null, experiment: mine}}
hydra:
  run: {{dir: .}}
  sweep: {{dir: {folder}/sweep, subdir: .}}
  output_subdir: null
  callbacks: {{parent: {{_target_: layerbits.tracking.multirun.MultirunParent}}}}
"""

SMALL = ("cpus_per_task=1", "gpus_per_node=null", "mem_gb=null", "timeout_min=5")


@pytest.fixture
def project(tmp_path, made_store):
    for folder in ("experiments", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "experiments" / "job.py").write_text(JOB)
    (tmp_path / "configs" / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    return tmp_path


@pytest.fixture
def client(project):
    return mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")


def sweep(project, slurm, pairs, *overrides):
    small = [f"hydra.launcher.{setting}" for setting in SMALL]
    command = [
        sys.executable,
        "experiments/job.py",
        "-m",
        f"pair={pairs}",
        "hydra/launcher=submitit_slurm",
        *small,
        *overrides,
    ]
    return started(command, project, **slurm.env, MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db")


def family(client):
    """The parent and its children by name."""
    (experiment,) = [e for e in client.search_experiments() if e.name == "mine"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert len(children) == len(runs) - 1
    return parent, children


def wait(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_four_jobs_are_four_children_of_one_parent(project, slurm, client):
    status, out = finished(sweep(project, slurm, "a,b,c,d"))
    assert status == 0, out
    parent, children = family(client)
    assert (parent.info.status, parent.data.tags["children.ok"]) == ("FINISHED", "4")
    assert sorted(children) == ["pair a", "pair b", "pair c", "pair d"]
    assert len({run.data.tags["layerbits.job"] for run in children.values()}) == 4


def test_failed_and_killed_jobs_are_failed_children_with_their_reason(project, slurm, client):
    status, out = finished(sweep(project, slurm, "a,bad,crash"))
    assert status == 2, out
    assert "error: pair=bad: no such pair; name another" in out
    parent, children = family(client)
    assert (parent.info.status, parent.data.tags["outcome"]) == ("FAILED", "partial")
    assert children["pair a"].data.tags["outcome"] == "ok"
    assert children["pair bad"].data.tags["reason"] == "no such pair; name another"
    assert children["pair crash"].info.status == "FAILED"
    assert "without a result" in children["pair crash"].data.tags["reason"]


def test_a_preempted_job_is_requeued_and_its_run_goes_on(project, slurm, client):
    going = sweep(project, slurm, "slow,a", "hydra.launcher.partition=low")
    starts = project / "starts"
    wait(starts.exists)
    slurm("sbatch", "--partition=high", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1")
    wait(lambda: starts.read_text() == "xx")
    (project / "go").touch()
    status, out = finished(going)
    assert status == 0, out
    parent, children = family(client)
    assert (parent.info.status, sorted(children)) == ("FINISHED", ["pair a", "pair slow"])
    slow = children["pair slow"]
    assert (slow.info.status, slow.data.tags["outcome"]) == ("FINISHED", "ok")
    assert "reason" not in slow.data.tags


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("partition=nowhere", r"nvalid partition.*see `sinfo`"),
        ("gpus_per_node=1", r"nvalid generic resource.*hydra\.launcher\.gpus_per_node=null asks for no GPU"),
    ],
)
def test_what_slurm_does_not_have_is_one_line_and_ends_the_parent(project, slurm, client, wrong, says):
    status, out = finished(sweep(project, slurm, "a,b", f"hydra.launcher.{wrong}"))
    assert status == 2, out
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert re.search(f"Slurm did not take the jobs.*{says}", line)
    parent, children = family(client)
    assert (parent.info.status, children) == ("FAILED", {})
    assert re.search(says, parent.data.tags["reason"])
