"""Runs a command until its own standard input closes: what is left of a server whose starter is gone, however.

``python server_watchdog.py COMMAND …`` is the leader of the server's process group. The starter holds the other end of
its standard input, so a starter that was killed with SIGKILL closes it too. Only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL."""


def main(command: list[str]) -> int:
    """Starts the command, waits for its end or for that of the starter, and ends the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # meant for the others of the group, which this process leads
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_starter, args=(child,), daemon=True).start()
    status = child.wait()
    _end_group()
    return status if status >= 0 else 128 - status


def _end_with_starter(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 64):  # not through sys.stdin, whose lock a thread would hold while Python ends
        pass
    child.terminate()
    deadline = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if child.poll() is None:
        child.kill()


def _end_group() -> None:
    """Ends what the command left behind; this process, too, where it had to be killed."""
    group = os.getpgrp()
    os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while members(group) not in ([os.getpid()], []) and time.monotonic() < deadline:
        time.sleep(0.05)
    if members(group) not in ([os.getpid()], []):
        os.killpg(group, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Processes of a group that have not ended (Linux; elsewhere none is known)."""
    pids = []
    try:
        entries = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for pid in entries:
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, of = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            pids.append(pid)
    return pids


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
