"""Programs that a model wrote: each in a process of its own, with limits and without a network.

Linux only. A new network namespace has no way out, not even to this machine; it takes root or user namespaces. The
limits keep a program from filling memory or disk, or running on. This is meant for honest mistakes, not for an
attacker: a program can still read files.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from layerbits.errors import UserError

SECONDS = 3.0
"""A program's time."""
MEMORY = 1 << 30
"""Bytes of address space."""
_FILE = 1 << 20
_NO_NAMESPACE = 97

_RUNNER = f"""
import ctypes, os, resource, sys
token, program = sys.stdin.read().split("\\n", 1)
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x40000000) and libc.unshare(0x50000000):  # CLONE_NEWNET, with CLONE_NEWUSER where we are not root
    os._exit({_NO_NAMESPACE})
for limit, value in (
    (resource.RLIMIT_AS, {MEMORY}),
    (resource.RLIMIT_CPU, {int(SECONDS) + 1}),
    (resource.RLIMIT_FSIZE, {_FILE}),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
out = os.dup(1)
null = os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1)
try:
    exec(compile(program, "program", "exec"), {{"__name__": "program"}})
except BaseException as error:
    os.write(out, f"{{type(error).__name__}}: {{error}}"[:200].encode(errors="replace"))
    os._exit(1)
os.write(out, token.encode())
os._exit(0)
"""


def run_program(program: str, seconds: float = SECONDS) -> str:
    """Runs a program.

    Args:
        program: Python source.
        seconds: Wall time that it may take.

    Returns:
        ``passed`` where it ran to its end without an error, otherwise why not.

    Raises:
        UserError: It cannot be cut off from the network here.
    """
    token = secrets.token_hex(16)  # says that the end was reached: a program may leave with status 0 before that
    with (
        tempfile.TemporaryDirectory(prefix="layerbits_program_") as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process,
    ):
        try:
            out, _ = process.communicate(f"{token}\n{program}".encode(errors="replace"), seconds)
        except subprocess.TimeoutExpired:
            return f"took more than {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it may have started
    if process.returncode == _NO_NAMESPACE:
        raise UserError(
            "programs cannot be cut off from the network here (no permission for a network namespace); leave "
            "tasks that run programs out, or start as root"
        )
    said = out.decode(errors="replace")
    if said == token:
        return "passed"
    return said or f"ended with status {process.returncode}"


def run_all(programs: Sequence[str]) -> list[str]:
    """Outcomes of programs, several at a time."""
    with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(run_program, programs))
