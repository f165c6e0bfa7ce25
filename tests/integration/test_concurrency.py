"""Many processes that log to one store at once, by the benchmark with smaller runs: no error, no missing value."""

import json
import subprocess
import sys

from tests.integration.tracking_support import ROOT, environment

pytest_plugins = ["tests.integration.servers"]
BLOCKS = 1  # so that the value of a metric is all of its history
RUNS = 5  # by each process; more by hand


def log_at_once(folder, processes, *options):
    """The record of some runs by each process; every value was read back and compared."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "concurrency.py",
        "--processes",
        str(processes),
        "--runs",
        str(RUNS),
    ]
    out = folder / "record.json"
    done = subprocess.run(
        [*command, "--start", "forkserver", "--blocks", str(BLOCKS), "--out", out, *options],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_six_processes_log_to_postgresql_at_once(team_server, tmp_path):
    record = log_at_once(tmp_path, 6, "--uri", team_server.url)
    assert (record["runs"], record["missing"]) == (6 * RUNS, [])
    assert record["run_s_max"] < 120, "a run waited for the others"


def test_three_processes_log_to_a_fresh_sqlite_file_at_once(tmp_path):
    record = log_at_once(tmp_path, 3)
    assert (record["store"], record["runs"], record["missing"]) == ("sqlite", 3 * RUNS, [])
