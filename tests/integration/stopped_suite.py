"""A suite that is stopped in the middle, for ``test_stopped_suite.py``; pytest does not collect it by its name."""

import os
import sys
import time
from pathlib import Path

import pytest

from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, serving
from tests.integration.entries import start

pytest_plugins = ["tests.integration.servers", "tests.integration.slurm"]
STARTED = Path(os.environ["STARTED"])
FAKE = Path(__file__).parents[1] / "unit" / "fake_vllm"


@pytest.fixture
def vllm(tmp_path):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    with serving(Launch(find_environment(str(script), Path()), 64, 4), tmp_path, "it", tmp_path / "log") as client:
        yield client


def test_with_servers(team_server, slurm, vllm):
    STARTED.write_text("started")
    time.sleep(300)


def test_of_a_job(vllm, tmp_path):
    STARTED.write_text("started")
    start("sensitivity", "dataset.size=large", f"output_root={tmp_path}", "tracking=none", "device=cpu")
    time.sleep(300)


def test_that_is_not_begun_any_more():
    STARTED.with_name("begun").touch()
