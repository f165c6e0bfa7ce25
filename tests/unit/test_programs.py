"""Programs run with limits, and without a network."""

import os
import time

import pytest

from layerbits.answers.programs import run_all, run_program


def test_a_program_that_ends_passes_and_one_that_fails_says_why():
    assert run_all(["x = 1\n", "assert 1 == 2\n", "1 / 0\n"]) == [
        "passed",
        "AssertionError: ",
        "ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(leave):
    assert run_program(leave) != "passed"


def test_printing_is_not_passing():
    assert run_program("print('passed'); assert False") == "AssertionError: "


def test_there_is_no_network():
    program = "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\n"
    assert "nreachable" in run_program(program)


def test_time_memory_and_files_are_limited(tmp_path):
    start = time.monotonic()
    assert run_program("while True: pass", seconds=0.5) == "took more than 0.5 s"
    assert time.monotonic() - start < 30
    assert run_program("x = bytearray(4 << 30)").startswith("MemoryError")
    assert "File too large" in run_program(f"open('{tmp_path}/x', 'wb').write(bytes(2 << 20))")


def test_what_a_program_started_ends_with_it(tmp_path):
    started = tmp_path / "pid"
    program = f"import subprocess\np = subprocess.Popen(['sleep', '60'])\nopen('{started}', 'w').write(str(p.pid))\n"
    assert run_program(program) == "passed"
    pid = int(started.read_text())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}")
