"""The steps of a pass keep Python's garbage collection from stopping them."""

import gc

import numpy as np
import pytest

from layerbits.scoring.passes import run_steps
from layerbits.scoring.steplog import Step, StepLog


@pytest.fixture
def log(tmp_path):
    return StepLog(tmp_path / "steps", "fingerprint")


def noting(frozen):
    """Scores a step, and notes how many objects are kept from the collection meanwhile."""

    def score(index):
        frozen.append(gc.get_freeze_count())
        none = np.zeros((0, 3), dtype=np.int64)
        one = np.ones(1, dtype=np.int64)
        return Step(np.full((1, 1), float(index)), one, np.ones((1, 1, 1)), one, none, 0.0)

    return score


def test_what_was_made_before_is_left_alone_while_steps_run(log):
    frozen = []
    run_steps(log, 2, noting(frozen))
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0


def test_who_has_frozen_it_before_undoes_it(log):
    gc.freeze()
    try:
        run_steps(log, 1, noting([]))
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_step_that_fails_leaves_nothing_frozen(log):
    def fails(_index):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_steps(log, 1, fails)
    assert gc.get_freeze_count() == 0
