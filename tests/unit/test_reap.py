"""Which process is certainly gone: only one of this machine, this boot and this namespace."""

import json
import os
import sys

import pytest

from layerbits.tracking import reap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are told apart by /proc")
PREFIXES = ("mlflow.layerbits.process.", "process.")


@pytest.fixture(scope="module")
def dead(python):
    """Tags of a process of this machine that has ended."""
    (line,) = python("import json; from layerbits.tracking.reap import process_tags; print(json.dumps(process_tags()))")
    return json.loads(line)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_process_that_ended_is_gone(dead, prefix):
    tags = {prefix + key.removeprefix(PREFIXES[0]): value for key, value in dead.items()}
    pid = dead["mlflow.layerbits.process.pid"]
    assert reap.why_gone(tags, 0) == f"process {pid} on {dead['mlflow.layerbits.process.host']} is gone"


def test_this_process_is_not_gone():
    assert reap.why_gone(reap.process_tags(), 0) is None


def test_a_number_that_another_process_has_now_is_gone(dead):
    tags = dead | {"mlflow.layerbits.process.pid": str(os.getpid())}
    assert "is gone" in reap.why_gone(tags, 0)


@pytest.mark.parametrize("name", ["host", "namespace"])
def test_nobody_here_knows_of_another_machine_or_container(dead, name):
    assert reap.why_gone(dead | {f"mlflow.layerbits.process.{name}": "another"}, 0) is None


def test_an_earlier_boot_of_this_machine_is_over_unless_the_run_logged_since(dead):
    if not dead["mlflow.layerbits.process.machine"]:
        pytest.skip("this machine has no /etc/machine-id")
    tags = dead | {"mlflow.layerbits.process.boot": "earlier"}
    assert "was started again since" in reap.why_gone(tags, 0)
    assert reap.why_gone(tags, 2**62) is None
    assert reap.why_gone(tags | {"mlflow.layerbits.process.machine": "another of that name"}, 0) is None


def test_a_run_that_says_nothing_of_its_process_is_left_alone(dead):
    assert reap.why_gone({}, 0) is None
    assert reap.why_gone({key: v for key, v in dead.items() if not key.endswith("boot")}, 0) is None
