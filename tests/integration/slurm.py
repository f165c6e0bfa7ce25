"""A real Slurm of one node, started by the tests: munge, slurmctld, slurmd."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.integration.tracking_support import free_port

_NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
JobRequeue=1
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """One node with four CPUs and two partitions; jobs of ``high`` preempt those of ``low``, which are requeued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._pids: list[Path] = []

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                host=socket.gethostname().partition(".")[0], folder=self.folder, ports=(free_port(), free_port())
            )
        )
        self("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._pids = [self.folder / f"{name}.pid" for name in ("slurmd", "slurmctld", "munge")]
        self("munged", "--force", *(f"--{option}={self.folder}/munge.{end}" for option, end in files.items()))
        self("slurmctld", "-c")
        self("slurmd")
        deadline = time.monotonic() + 180
        while "idle" not in self("sinfo", "--noheader", "--format=%T", check=False):
            if time.monotonic() > deadline:
                raise RuntimeError((self.folder / "slurmctld.log").read_text()[-3000:])
            time.sleep(0.2)

    def __call__(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr}")
        return done.stdout

    def stop(self) -> None:
        self("scancel", "--user=root", "--signal=KILL", check=False)
        for pid in self._pids:
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def slurm():
    missing = [name for name in _NEEDED if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge ({', '.join(missing)})")
    # In a folder of pytest the path of a socket may have more than the 107 characters that there is room for.
    with tempfile.TemporaryDirectory(prefix="layerbits-slurm-", ignore_cleanup_errors=True) as folder:
        made = Slurm(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()
