"""vLLM's own server as a child process: started, waited for, and ended in all cases."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType

from layerbits.errors import UserError
from layerbits.serving import server_watchdog
from layerbits.serving.client import Client
from layerbits.serving.environment import Environment

NAME = "checkpoint"
"""What a server that was started here calls its model."""

_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ?)?")
_ERROR = re.compile(r"^\s*((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Interrupt)\b:?.*|Value error, .*)$")
_ABOUT_OTHERS = (
    "Engine core init",
    "WorkerProc init",
    "See root cause",
    "Engine process failed",
    "failed to be inspected",
    "1 validation error for",
    "EngineDead",
)
_LACKING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")
_LOADING = 0.25  # seconds between two looks


class Refused(Exception):
    """The server ended, or answered with an error; the message is vLLM's own words."""


@dataclass(frozen=True)
class Launch:
    """How servers are started.

    Attributes:
        environment: The Python with vLLM.
        max_length: Tokens of a text and its continuation; ``None`` = as many as the model takes.
        top_k: Tokens that it is to tell per position; -1 = all, ``None`` = vLLM's own limit.
        dtype: vLLM's ``--dtype``.
        port: ``None`` = any free one.
        plugin: Folder with a plugin of vLLM to put on its path.
        arguments: Further arguments.
        seconds: How long it may load.
    """

    environment: Environment
    max_length: int | None = None
    top_k: int | None = None
    dtype: str = "auto"
    port: int | None = None
    plugin: Path | None = None
    arguments: tuple[str, ...] = ()
    seconds: float = 1800.0

    def command(self, folder: Path, port: int, name: str = NAME) -> list[str]:
        """Command line of a server: what ``vllm serve`` runs, which on CPUs misses a package of its own name."""
        limits = [] if self.max_length is None else ["--max-model-len", str(self.max_length), "--max-num-seqs", "4"]
        limits += [] if self.top_k is None else ["--max-logprobs", str(self.top_k)]
        # A few texts do not repay the capture of graphs, nor CPUs the compilation.
        eager = ["--enforce-eager"] if self.max_length is not None or self.environment.on_cpu else []
        return [
            *(str(self.environment.python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", self.dtype, *limits, *eager, *self.arguments),
        ]

    def variables(self) -> Mapping[str, str]:
        """Its environment; what the user has set stays."""
        values = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.environment.on_cpu:  # by default it takes half of the memory for its cache, and leaves a core idle
            values |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            # One process for engine and worker (each imports vLLM anew); threads that wait leave the core to others.
            values |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_WAIT_POLICY": "PASSIVE"}
            values |= {"VLLM_CPU_INT4_W4A8": "0"}  # on CPUs with AMX it rounds the inputs of INT4 weights to INT8
            values |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} if sys.platform == "linux" else {}
        values |= os.environ
        values.pop("PYTHONPATH", None)  # is for this Python
        if self.plugin is not None:
            values["PYTHONPATH"] = str(self.plugin)
        return values


@contextmanager
def serving(launch: Launch, folder: Path, what: str, log: Path) -> Iterator[Client]:
    """A server of a checkpoint until the end of the block; no process of it is left then, whatever happens.

    A stop signal (SIGTERM, SIGHUP) ends it on the way out, where nobody else has a handler for it; should this process
    be killed outright, :mod:`layerbits.serving.server_watchdog` ends it.

    Args:
        launch: How.
        folder: The checkpoint.
        what: It in a word, for the progress line.
        log: File for what it says.

    Raises:
        Refused: It ended while loading; in its own words.
        UserError: The port is in use, or it did not get ready in time.
    """
    port = free_port(launch.port, "vllm.port, or none for any free one")
    with started(launch.command(folder, port), launch.variables(), log) as process:
        client = Client(f"http://127.0.0.1:{port}")
        _wait(client, process, what, log, launch.seconds)
        yield client


@contextmanager
def started(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own until the end of the block; none of the group is left then, as in `serving`.

    Args:
        command: Its command line.
        variables: Its environment.
        log: File for what it says.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with_watchdog = [sys.executable, server_watchdog.__file__, *command]
    with _stop_signals(), log.open("wb") as out:
        process = subprocess.Popen(
            with_watchdog, stdin=subprocess.PIPE, stdout=out, stderr=out, env=dict(variables), start_new_session=True
        )
        try:
            yield process
        finally:
            _end(process)


def refusal(process: subprocess.Popen[bytes], log: Path) -> Refused:
    """Why a process of vLLM ended, in its own words."""
    words, status = last_error(log), process.wait()
    if lacking := _LACKING.match(words):
        words += f"; install {lacking[1]} into vLLM's environment, in the build that fits its torch"
    if status > 128:
        return Refused(f"it {died(status - 128)}" + (f"; its last words: {words}" if words else ""))
    return Refused(words or f"it ended with status {status} and said nothing")


def died(number: int) -> str:
    """How a process ended that a signal ended."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = str(number)
    why = {"SIGILL": " (an instruction that this CPU does not have)", "SIGKILL": " (out of memory, or stopped)"}
    return f"ended by signal {name}{why.get(name, '')}"


def last_error(log: Path, otherwise: str = "") -> str:
    """The last error that a log tells, but for those that only say that another process had one.

    Args:
        log: What a server said.
        otherwise: The answer where it tells none; empty = its last line.
    """
    lines = [_PREFIX.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    errors = [_whole(m.group(1).strip(), lines[i + 1 :]) for i, line in enumerate(lines) if (m := _ERROR.match(line))]
    telling = [e for e in errors if not any(words in e for words in _ABOUT_OTHERS)]
    messages = telling or ([otherwise] if otherwise else errors or [line for line in lines if line.strip()] or [""])
    return messages[-1].strip()[:600]


def _whole(error: str, after: Sequence[str]) -> str:
    """An error with the indented lines below it, where it announces them by a colon."""
    if not error.endswith(":"):
        return error
    reasons = "; ".join(line.strip() for line in takewhile(lambda line: line[:1].isspace(), after))
    return f"{error} {reasons}" if reasons else error


def free_port(wanted: int | None, other: str) -> int:
    """A port of this machine that nobody listens at.

    Args:
        wanted: ``None`` = any.
        other: How to name another.

    Raises:
        UserError: The one that is wanted is not free.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError):
            raise UserError(f"port {wanted} is in use or not allowed; name another with {other}") from None
        return int(probe.getsockname()[1])


def _wait(client: Client, process: subprocess.Popen[bytes], what: str, log: Path, seconds: float) -> None:
    start = time.monotonic()
    shown = -1
    live = sys.stderr.isatty()
    print(f"vLLM loads {what}; its log is {log}", file=sys.stderr, flush=True)
    while not client.healthy():
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise refusal(process, log)
        if waited > seconds:
            raise UserError(
                f"vLLM is not ready after {seconds:.0f} s of loading {what} (its log is {log}); raise vllm.seconds"
            )
        if live and int(waited) != shown:
            shown = int(waited)
            print(f"\rvLLM loads {what}: {shown} s", end="", file=sys.stderr, flush=True)
        time.sleep(_LOADING)
    print(
        f"{chr(13) if live else ''}vLLM serves {what} after {time.monotonic() - start:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tells the watchdog to end its group, and makes sure of it."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(3 * server_watchdog.GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + server_watchdog.GRACE
    while server_watchdog.members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Stop signals as exceptions, where their handler is still the default, which would end this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
