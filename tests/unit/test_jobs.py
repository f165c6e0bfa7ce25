"""Jobs in a run of the store, and without one."""

from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from layerbits import jobs
from layerbits.errors import Skipped, UserError
from layerbits.report.remarks import with_remarks
from layerbits.tracking.links import linked, models_of
from layerbits.tracking.made import Data, Made, Measured, Registration, read_record
from layerbits.tracking.settings import TrackingSpec

UNTRACKED = TrackingSpec(enabled=False, uri="sqlite:///x.db", experiment="x", run_name="mine", system_metrics=False)


def test_without_tracking_a_result_is_made_with_its_record_and_not_logged(tmp_path):
    def make(uri):
        assert uri == "sqlite:///x.db"
        return Made(tmp_path, {"kl": 1.0, "bad": float("nan")}, {"eff.x": "1"}, {"source_run_id": "a"})

    jobs.run_job(UNTRACKED, tmp_path, "a probe", "probe", make)
    recorded = read_record(tmp_path)
    assert (recorded.name, recorded.kind, recorded.parent) == ("mine", "probe", False)
    assert (recorded.made.metrics, recorded.made.params) == ({"kl": 1.0}, {"eff.x": "1"})


def test_only_the_first_run_has_the_name_of_the_settings(tmp_path):
    tracker = jobs.Tracker(UNTRACKED, tmp_path)
    with tracker.parent("all") as parent, tracker.run("one") as run:
        assert (parent.name, run.name, run.run_id) == ("mine", "one", "")


def test_a_failure_is_raised_once_the_record_is_written(tmp_path):
    with pytest.raises(UserError, match="differs"), jobs.Tracker(UNTRACKED, tmp_path).run("x") as run:
        run.log(Made(tmp_path, failure=UserError("it differs")))
    assert str(read_record(tmp_path).made.failure) == "it differs"


def test_a_record_is_read_as_it_was_written(tmp_path):
    registration = Registration("model", {"kl": "1"}, "checkpoint")
    made = Made(tmp_path, failure=Skipped("no vLLM"), artifacts={"checkpoint": Path("/x")}, registration=registration)
    made.save("check", "serve_check", parent=True)
    recorded = read_record(tmp_path)
    assert type(recorded.made.failure) is Skipped
    assert (recorded.made.artifacts, recorded.made.registration) == (made.artifacts, registration)
    assert recorded.parent


def test_data_and_what_was_measured_are_in_the_record(tmp_path):
    data = (Data({"name": "sums", "digest": "d"}, "evaluation"),)
    linked = Measured("tiny bits_8", "a1", ("eval/sums/bits_8/lost",), "sums")
    measured = (linked, Measured("tiny bits_8", "a1", (), values={"gib": 2.5}, tags={"checkpoint.path": "/x"}))
    Made(tmp_path, data=data, measured=measured, remarks={"a1": "worse"}).save("e", "evaluation")
    made = read_record(tmp_path).made
    assert (made.data, made.measured, made.remarks) == (data, measured, {"a1": "worse"})


def test_a_description_takes_remarks_once_and_keeps_others(tmp_path):
    first = with_remarks("| table |\n", {"a": "sums: worse by 1–2 points", "b": "sums: no difference seen"})
    again = with_remarks(first, {"a": "sums: better by 1–2 points"})
    lines = again.splitlines()
    assert lines[0] == "| table |"
    assert lines[-2:] == ["- a: sums: better by 1–2 points", "- b: sums: no difference seen"]
    assert again.count("Answers (latest evaluation)") == 1
    assert with_remarks("as it was", {}) == "as it was"
    long = with_remarks("line\n" * 3000, {"a": "worse"})
    assert len(long) <= 8000
    assert long.endswith("line\n\nAnswers (latest evaluation):\n\n- a: worse\n")


def test_a_server_without_logged_models_gets_metrics_without_links():
    class Old:
        def search_logged_models(self, *_, **__):
            raise MlflowException("no such path", ENDPOINT_NOT_FOUND)

    measured = [Measured("tiny", "a1", ("eval/sums/a/lost",), "sums")]
    assert models_of(Old(), "1", "run", measured) == {}
    metrics = [Metric("eval/sums/a/lost", 1.0, 0, 0)]
    assert linked("run", metrics, measured, (), {}) == metrics


def test_a_damaged_record_is_one_line(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not a record that this version reads"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_record(tmp_path)


def test_a_note_has_whole_lines_that_fit_a_tag():
    (short,) = jobs.note("a\nb\n").values()
    (long,) = jobs.note("\n".join(["x" * 99] * 200)).values()
    assert short == "a\nb"
    assert 7900 <= len(long) <= 8000
    assert set(long.split("\n")) == {"x" * 99}
