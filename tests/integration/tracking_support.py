"""A small result with its folder, and a real tracking server, for the tests of ``layerbits.tracking``."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from layerbits.atomic import write_json
from layerbits.results.assignment import Assignment
from layerbits.results.manifest import to_manifest
from layerbits.results.result import (
    Allocation,
    CalibrationInfo,
    CandidateInfo,
    Group,
    ModelInfo,
    NonFinite,
    SensitivityResult,
)

KINDS = ("qkv", "o", "gate_up", "down")
ROOT = Path(__file__).resolve().parents[2]


def environment(**changes):
    """For a process that imports the checkout: this one's, without what it learnt of MLflow."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "LAYERBITS_"))}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **changes}


def started(command, folder, **changes):
    """A process in a folder, what it prints in one pipe; the environment is :func:`environment`'s."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment(**changes),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(process):
    """Its exit status and what it printed; it is killed when it takes too long."""
    try:
        out, _ = process.communicate(timeout=420)
    finally:
        process.kill()
    return process.returncode, out


def small_result(blocks=3, seed=0, **changes):
    """Scores down to 1e-12, one of them infinite (``B01.o``)."""
    groups = tuple(
        Group(f"B{b:02d}.{kind}", b, kind, (f"model.layers.{b}.{kind}",), 1000) for b in range(blocks) for kind in KINDS
    )
    info = CandidateInfo(
        "wint8_afp16",
        "wint8_afp16",
        "default",
        "INT8_WEIGHT_ONLY_CFG",
        "int8",
        "fp16",
        {"algorithm": "max"},
        "ab12",
        8,
        8,
    )
    scores = 10.0 ** -np.random.default_rng(seed).uniform(6, 12, len(groups))
    scores[[g.key == "B01.o" for g in groups]] = np.inf
    fields = {
        "model": ModelInfo("tiny", "org/tiny", "c0ffee", "TinyForCausalLM", "float32"),
        "calibration": CalibrationInfo(
            "everyday", "small", "d1" * 32, "packed", 128, 2, 16, 16, 4, 4, 500, (250, 250), 0.0
        ),
        "method": "gradient",
        "engine": "stock",
        "seed": 0,
        "device": "cpu",
        "groups": groups,
        "candidate": info,
        "scores": scores,
        "predicted_kl": scores * 3e4,
        "allocation": Allocation(
            12.0, Assignment(info.name if i % 2 else None for i in range(len(groups))), 12.0, 12.5, 1e-7
        ),
        "nonfinite": (NonFinite("B01.o", info.name),),
        "provenance": {"version.layerbits": "0.1.0", "version.torch": "2.13.0", "git.commit": "abc"},
        "seconds": {"load": 1.0, "score": 2.5},
        "memory": {"peak_rss_gb": 0.5},
        "tags": {"deployable": "true"},
        "created": "2026-03-04T05:06:07+00:00",
    }
    return SensitivityResult(**{**fields, **changes})


def write_folder(result, folder: Path) -> Path:
    """Some of the files that a run leaves, the manifest among them."""
    write_json(folder / "manifest.json", to_manifest(result))
    for name in ("config/composed.yaml", "report/layer-sensitivity-report.md", "figures/heatmap.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def free_port() -> int:
    """A port below those that the kernel gives to connections: none of them takes it before the server does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """``mlflow server`` on a SQLite store; ``start`` again after ``kill`` keeps port and store."""

    def __init__(self, store: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._store = store
        self._process = None
        self.command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        self.command += ["--backend-store-uri", f"sqlite:///{self._store / 'mlflow.db'}"]
        self.command += ["--artifacts-destination", str(self._store / "artifacts")]

    def start(self) -> None:
        env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        with (self._store / "server.log").open("w") as log:
            self._process = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180  # some seconds, but on a busy machine
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        self.kill()
        raise RuntimeError((self._store / "server.log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
