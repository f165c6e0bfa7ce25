"""A suite that is stopped by SIGTERM leaves no server of its own: MLflow, PostgreSQL, Slurm, vLLM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.entries import ROOT, environment

SUITE = Path(__file__).parent / "stopped_suite.py"


@pytest.fixture
def suite(tmp_path):
    """Starts some of the suite's tests in a process group, and gives it when its servers are up."""
    started, running = tmp_path / "started", []

    def run(test, *options):
        command = [sys.executable, "-m", "pytest", f"{SUITE}::{test}", f"{SUITE}::test_that_is_not_begun_any_more"]
        command += ["--basetemp", str(tmp_path / "base"), "-p", "no:cacheprovider", *options]
        variables = environment(STARTED=started)  # marks all that it starts
        log = (tmp_path / "log").open("w")
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)
        )
        deadline = time.monotonic() + 240
        while not started.exists():
            assert running[0].poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return running[0]

    yield run
    for left in of(tmp_path):
        left.kill()


def of(folder):
    """Processes that have a folder in their command line, their environment or as where they are, and run."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), process.cwd(), *process.environ().values()]
            if process.pid != os.getpid() and process.status() != "zombie" and any(str(folder) in t for t in told):
                found.append(process)
        except psutil.Error:
            continue
    return found


def names(folder):
    return sorted({" ".join(process.cmdline()) for process in of(folder)})


def test_servers_end_with_a_suite_whose_process_group_is_stopped(suite, tmp_path):
    running = suite("test_with_servers", "-n", "1")
    there = " ".join(names(tmp_path))
    for server in ("mlflow", "postgres", "slurmctld", "munged", "server_watchdog.py"):
        assert server in there
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(180) != 0
    ends(tmp_path)


def test_servers_end_with_a_suite_whose_first_process_is_stopped_in_a_job(suite, tmp_path):
    running = suite("test_of_a_job", "-n", "1")
    running.send_signal(signal.SIGTERM)
    assert running.wait(180) != 0
    ends(tmp_path)


def ends(folder):
    deadline = time.monotonic() + 60  # the daemons of Slurm end by themselves
    while of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert names(folder) == []
    assert not (folder / "begun").exists()
