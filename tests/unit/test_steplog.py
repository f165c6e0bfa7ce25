"""Finished steps on disk: the first of two stays, and what a crash of the machine tore is not finished."""

import numpy as np
import pytest

from layerbits.errors import UserError
from layerbits.scoring.steplog import Calibrated, Step, StepLog


def step(value):
    empty = np.zeros(0, dtype=np.int64)
    return Step(np.full((2, 1), float(value)), empty, np.zeros((0, 2, 1)), empty, np.zeros((0, 3), dtype=np.int64), 1.5)


def test_a_step_reads_back(tmp_path):
    log = StepLog(tmp_path, "me")
    assert log.read(0) is None
    log.write(0, step(1))
    assert log.read(0).raw.tolist() == [[1.0], [1.0]]


def test_of_two_processes_with_the_same_parameters_both_go_on_with_what_the_first_found(tmp_path):
    one, other = StepLog(tmp_path, "me"), StepLog(tmp_path, "me")
    one.write(0, step(1))
    other.write(0, step(2))
    one.write_calibration(Calibrated({"x": np.ones(1)}, {}))
    other.write_calibration(Calibrated({"x": np.zeros(1)}, {}))
    assert one.read(0).raw.tolist() == other.read(0).raw.tolist() == [[1.0], [1.0]]
    assert other.read_calibration().ranges == {"x": np.ones(1)}


def test_a_step_of_an_earlier_version_is_not_finished(tmp_path):
    log = StepLog(tmp_path, "me")
    earlier = {name: value for name, value in vars(step(1)).items() if name != "loss"}
    np.savez(tmp_path / "step-00000.npz", **earlier)
    assert log.read(0) is None
    log.write(0, step(2))
    assert log.read(0).loss == 1.5


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_torn_step_is_not_finished(tmp_path, kept):
    log = StepLog(tmp_path, "me")
    log.write(0, step(1))
    (path,) = tmp_path.glob("step-*")
    path.write_bytes(path.read_bytes()[:kept])
    assert log.read(0) is None
    log.write(0, step(2))
    assert log.read(0).raw[0, 0] == 2


def test_a_folder_of_other_parameters_is_refused(tmp_path):
    StepLog(tmp_path, "me")
    with pytest.raises(UserError, match="other parameters"):
        StepLog(tmp_path, "you")
