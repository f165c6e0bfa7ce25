"""Several hosts without a shared disk: network namespaces of this machine, ``torchrun``, gloo."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration import host_worker
from tests.integration.scoring_support import ROOT
from tests.integration.tracking_support import finished, started

WORKER = Path(host_worker.__file__)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Scores of one process."""
    return host_worker.scored(tmp_path_factory.mktemp("alone")).raw


def torchrun(*arguments, before=(), folder, **env):
    folder.mkdir(exist_ok=True)
    command = [*before, sys.executable, "-m", "torch.distributed.run", *arguments]
    paths = f"{ROOT / 'src'}:{ROOT}"
    return started(command, folder, PYTHONPATH=paths, OMP_NUM_THREADS="1", HOME=str(folder), **env)


@pytest.fixture
def hosts():
    """Two network namespaces with an address each, joined by a cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"lb{os.getpid()}{side}" for side in "ab"]
    made = []

    def ip(*arguments):
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", f"{names[0]}v", "netns", names[0], "type", "veth", "peer", f"{names[1]}v", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", f"{name}v", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


# A host is gone after 5 s without a sign of life (15 by default), and none is waited for longer than 6 s.
_WAITS = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=6"


def test_a_host_dies_half_way_and_the_other_takes_over(hosts, alone, tmp_path):
    both = [
        torchrun(
            "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.77.0.1:29511", f"--rdzv-conf={_WAITS},is_host={int(number == 1)}",
            f"--local-addr=10.77.0.{number}", WORKER, tmp_path / name, *(["--dies"] if number == 2 else []),
            before=("ip", "netns", "exec", name), folder=tmp_path / name, GLOO_SOCKET_IFNAME=f"{name}v",
        )
        for number, name in enumerate(hosts, 1)
    ]  # fmt: skip
    (status, out), (killed, _) = map(finished, both)
    assert status == 0, out
    assert killed != 0
    assert "one of the 2 processes is gone" in out
    found = np.load(tmp_path / hosts[0] / "scores-0.npz")
    np.testing.assert_allclose(found["raw"], alone, rtol=1e-12)
    assert found["world"] == 1
    assert len(found["scored"]) == host_worker.STEPS // 2, "its own steps of the first start are kept"


def on_one_host(command, folder):
    """Two processes of one host, each with ``$RANK`` in its command line."""
    script = folder / "start.sh"
    script.write_text(command)
    return finished(torchrun("--standalone", "--nproc-per-node=2", "--no-python", "bash", script, folder=folder))


def test_every_host_ends_with_all_steps_and_none_is_scored_twice(alone, tmp_path):
    kept = tmp_path / "0" / "search"
    host_worker.scored(kept)
    for step in kept.glob("step-0000[2-7].npz"):
        step.unlink()
    command = f"mkdir -p {tmp_path}/$RANK && exec {sys.executable} {WORKER} {tmp_path}/$RANK"
    status, out = on_one_host(command, tmp_path)
    assert status == 0, out
    for rank, expected in enumerate(([2, 4, 6], [3, 5, 7])):
        found = np.load(tmp_path / str(rank) / f"scores-{rank}.npz")
        np.testing.assert_allclose(found["raw"], alone, rtol=1e-12)
        assert found["scored"].tolist() == expected
        assert len(list((tmp_path / str(rank) / "search").glob("step-*.npz"))) == host_worker.STEPS


def test_hosts_with_other_model_files_are_told_apart(tmp_path):
    code = (
        "import os; from layerbits import entry; from layerbits.errors import UserError; "
        "from layerbits.scoring.distributed import agree\n"
        "try: agree({'model files': 'files-' + os.environ['RANK'], 'captions': 'c'})\n"
        "except UserError as error: entry.fail(error)"
    )
    (tmp_path / "agree.py").write_text(code)
    status, out = on_one_host(f"exec {sys.executable} {tmp_path}/agree.py", tmp_path)
    assert status != 0
    assert "error: the processes differ in their model files: files-0 in process 0 on" in out
    assert "copy the same checkpoint to every host" in out
