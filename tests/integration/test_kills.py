"""Two of the moments of ``tests.integration.kills``, in scoring and in logging; the whole script is for by hand."""

import subprocess
import sys

from tests.integration.tracking_support import ROOT, environment


def test_runs_that_were_killed_come_out_the_same_when_started_again():
    command = [sys.executable, "-m", "tests.integration.kills", "--moments", "2", "--seed", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 equal" in done.stdout
