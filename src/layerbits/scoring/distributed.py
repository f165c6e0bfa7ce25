"""Several processes, as ``torchrun`` starts them on one host or more: who does what, and what they tell each other.

Processes share no disk: what one of them found reaches the others through ``torch.distributed``. It is plain data in
host memory, a few megabytes a step, so the backend is gloo wherever the model computes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TypeVar

from layerbits.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)
"""How long the others are waited for. One that is gone closes its connections, which is seen at once; this is for one
that is slow."""


def rank() -> int:
    """Number of this process; 0 without ``torchrun``."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(kind: str) -> str:
    """This process's device: its own GPU where there are several processes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" and world() > 1 else kind


def gather(value: T) -> list[T]:
    """What every process has, by rank; all of them call it.

    Raises:
        UserError: One of them is gone.
    """
    if world() == 1:
        return [value]
    with _together() as dist:
        everyone = [value] * world()
        dist.all_gather_object(everyone, value)
        return everyone


def broadcast_object(value: T, by: int) -> T:
    """What one process has; all of them call it.

    Args:
        value: Of any use in process ``by`` alone.
        by: Its rank.

    Raises:
        UserError: One of them is gone.
    """
    if world() == 1:
        return value
    with _together() as dist:
        values = [value]
        dist.broadcast_object_list(values, src=by)
        return values[0]


def share(count: int, done: Sequence[int]) -> list[int]:
    """Positions of this process: every one that no process has done yet goes to one of them.

    Args:
        count: How many there are.
        done: Those that this process has.
    """
    anywhere = {index for theirs in gather(list(done)) for index in theirs}
    return [index for index in range(count) if index not in anywhere][rank() :: world()]


def agree(facts: Mapping[str, str]) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
        facts: What must be the same, by what it is called in the error.

    Raises:
        UserError: Something differs.
    """
    everyone = gather((socket.gethostname(), dict(facts)))
    for name in facts:
        values: dict[str, list[str]] = {}
        for number, (host, theirs) in enumerate(everyone):
            values.setdefault(theirs[name], []).append(f"process {number} on {host}")
        if len(values) > 1:
            where = "; ".join(f"{value} in {_some(who)}" for value, who in values.items())
            raise UserError(f"the processes differ in their {name}: {where}; {_MEND.get(name, _SAME_COMMAND)}")


_SAME_COMMAND = "start every process with the same command on the same version"
_MEND = {
    "model files": "copy the same checkpoint to every host",
    "captions": "copy the same caption file to every host",
}


def _some(who: Sequence[str]) -> str:
    return who[0] if len(who) == 1 else f"{who[0]} and {len(who) - 1} more"


@contextmanager
def _together() -> Iterator[ModuleType]:
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        yield dist
    except RuntimeError as error:  # gloo's, and that of the store behind it
        raise UserError(
            f"one of the {world()} processes is gone ({str(error).strip().splitlines()[0]}); what is finished is kept "
            "in the search checkpoint of each host: start again, on these hosts or on fewer"
        ) from error
