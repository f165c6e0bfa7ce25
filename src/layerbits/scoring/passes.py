"""The steps of a pass: those that are not done yet, each kept when it is."""

from __future__ import annotations

from collections.abc import Callable

from layerbits.progress import progress
from layerbits.scoring import distributed
from layerbits.scoring.steplog import Step, StepLog


def run_steps(log: StepLog, count: int, score: Callable[[int], Step]) -> list[Step]:
    """Scores the steps that the log does not hold, this process's share of them.

    Args:
        log: Of the pass.
        count: Steps of the whole pass.
        score: Position of a batch → its step.

    Returns:
        All steps, in order.
    """
    mine = range(distributed.rank(), count, distributed.world())
    missing = [index for index in mine if not log.holds(index)]
    for index in progress(missing, "scoring", done=len(mine) - len(missing)):
        log.write(index, score(index))
    distributed.barrier()
    return [step for step in map(log.read, range(count)) if step is not None]
