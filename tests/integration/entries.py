"""Entry scripts from their command line, in this process: its imports are made once and not per call.

What only a process of its own can show (exit codes of ``mlflow run``, signals, a fresh store) starts one with
:func:`start_process`, or :func:`start_together` one for several.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.integration import one_after_another

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """What a script left: as ``subprocess.CompletedProcess`` names it."""

    returncode: int
    stdout: str
    stderr: str


def environment(**changes: str) -> dict[str, str]:
    """The environment of a script: this one without a store or a cache of its own, and the changes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "LAYERBITS_"))}
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    always = {"PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**kept, **always, **{k: str(v) for k, v in changes.items()}}


def start(script: str, *arguments: object, **changes: str) -> Ended:
    """Runs ``experiments/<script>.py`` to its end.

    Args:
        script: Its name.
        arguments: Hydra's command line.
        changes: Environment variables.
    """
    import mlflow
    from hydra.core.global_hydra import GlobalHydra

    from layerbits.failures import failed

    path, status = ROOT / "experiments" / f"{script}.py", 0
    out, errors = io.StringIO(), io.StringIO()
    handlers, folder = list(logging.root.handlers), Path.cwd()
    with (
        mock.patch.dict(os.environ, environment(**changes), clear=True),
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        os.chdir(ROOT)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            os.chdir(folder)
            logging.root.handlers[:] = handlers
            GlobalHydra.instance().clear()
            failed.clear()
            while mlflow.active_run():  # a process would have taken it along; the next script is no child of it
                mlflow.end_run()
            mlflow.set_tracking_uri(None)
    if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):  # meant for the suite; the job took it for its own
        raise KeyboardInterrupt("stopped by a signal")
    return Ended(status, out.getvalue(), errors.getvalue())


def start_process(script: str, *arguments: object, **changes: str) -> Ended:
    """As :func:`start`, in a process of its own."""
    command = [sys.executable, f"experiments/{script}.py", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, check=False, timeout=300
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def start_together(*commands: Sequence[object], **changes: str) -> list[Ended]:
    """As :func:`start_process`, one script after the other in one process: its imports are made once.

    Args:
        commands: Name and arguments of each script.
        changes: Environment variables.
    """
    words = [str(word) for command in commands for word in ("--", *command)]
    runner = Path(one_after_another.__file__)
    done = subprocess.run(
        [sys.executable, runner, *words[1:]],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    parts = [re.split(rf"^{one_after_another.END} (\d+)\n", text, flags=re.M) for text in (done.stdout, done.stderr)]
    ended = [
        Ended(int(status), *both) for status, *both in zip(parts[0][1::2], parts[0][::2], parts[1][::2], strict=False)
    ]
    assert len(ended) == len(commands), done.stderr
    return ended
