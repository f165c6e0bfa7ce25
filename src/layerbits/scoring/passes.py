"""The steps of a pass: those that are not done yet, each kept when it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from layerbits.progress import progress
from layerbits.scoring import distributed
from layerbits.scoring.steplog import Step, StepLog

_FROZEN_AT_START = gc.get_freeze_count()
"""Objects that the interpreter itself keeps out of collections: hundreds on Python 3.12, none on 3.11 and 3.13."""


def run_steps(log: StepLog, count: int, score: Callable[[int], Step]) -> list[Step]:
    """Scores the steps that no process's log holds, this process's share of them.

    Args:
        log: Of the pass, on this host.
        count: Steps of the whole pass.
        score: Position of a batch → its step.

    Returns:
        All steps, in order; the log holds them too.
    """
    mine = distributed.share(count, log.finished(count))
    before = -(-count // distributed.world()) - len(mine)  # of this process's part, were all of it to do
    with _without_full_collections():
        for index in progress(mine, "scoring", done=max(0, before)):
            log.write(index, score(index))
    return _exchange(log, count)


@contextmanager
def _without_full_collections() -> Iterator[None]:
    """Keeps Python's garbage collection from walking over all that was made before.

    The objects of the imported libraries alone take it 0.3 s, in which no kernel is launched.
    """
    if gc.get_freeze_count() > _FROZEN_AT_START:  # by someone else, who will undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _exchange(log: StepLog, count: int) -> list[Step]:
    """All steps, of which every one went from the process that has it to the hosts that do not."""
    steps = [log.read(index) for index in range(count)]
    mine = [index for index, step in enumerate(steps) if step is not None]
    everyone = [set(done) for done in distributed.gather(mine)]
    for index in range(count):
        owners = [rank for rank, done in enumerate(everyone) if index in done]
        if len(owners) < len(everyone):
            step = distributed.broadcast_object(steps[index], owners[0])
            if steps[index] is None and step is not None:
                log.write(index, step)
                steps[index] = log.read(index)  # what another process of this host has kept in the meantime stays
    return [step for step in steps if step is not None]
