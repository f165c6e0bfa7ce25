"""The steps of a pass keep Python's garbage collection from stopping them."""

import gc
import weakref

import numpy as np
import pytest

from layerbits.scoring.passes import run_steps
from layerbits.scoring.steplog import Step, StepLog

pytestmark = pytest.mark.usefixtures("nothing_frozen")  # as in a run; the suite freezes what it imported


@pytest.fixture
def log(tmp_path):
    return StepLog(tmp_path / "steps", "fingerprint")


def garbage():
    """What only a full collection can free, and a reference that tells whether it has been."""

    class Knot:
        pass

    knot = Knot()
    knot.itself = knot
    gc.collect(1)  # out of the young generations
    return weakref.ref(knot)


def collecting(alive, *references):
    """Scores a step in which everything is collected, and notes whether what the references are to is left."""

    def score(index):
        gc.collect()
        alive.extend(reference() is not None for reference in references)
        none = np.zeros((0, 3), dtype=np.int64)
        one = np.ones(1, dtype=np.int64)
        return Step(np.full((1, 1), float(index)), one, np.ones((1, 1, 1)), one, none, 0.0)

    return score


def test_what_was_made_before_is_left_alone_while_steps_run(log):
    alive, made = [], garbage()
    run_steps(log, 2, collecting(alive, made))
    assert alive == [True, True]
    gc.collect()
    assert made() is None


def test_who_has_frozen_it_before_undoes_it(log):
    made = garbage()
    gc.freeze()
    try:
        run_steps(log, 1, collecting([]))
        gc.collect()
        assert made() is not None
    finally:
        gc.unfreeze()


def test_a_step_that_fails_leaves_nothing_frozen(log):
    def fails(_index):
        raise RuntimeError("no")

    made = garbage()
    with pytest.raises(RuntimeError):
        run_steps(log, 1, fails)
    gc.collect()
    assert made() is None
