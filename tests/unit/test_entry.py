"""Command lines as MLflow passes them, and what becomes of a job."""

import sys

import pytest

from layerbits import entry
from layerbits.errors import UserError
from layerbits.overrides import hydra_arguments
from layerbits.tracking.settings import TrackingSpec

UNTRACKED = TrackingSpec(enabled=False, uri="sqlite:///x.db", experiment="x", run_name=None, system_metrics=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=1", "+overrides=none"], ["a=1"]),
        (["+overrides=b=2 c=3"], ["b=2", "c=3"]),
        (["--x", "5"], ["x=5"]),
        (["a=1", "-m"], ["-m", "a=1"]),
        (["--cfg", "job"], ["--cfg", "job"]),
    ],
)
def test_a_command_line_of_mlflow_becomes_hydras(given, expected):
    assert hydra_arguments(given) == expected


@pytest.fixture
def configs(tmp_path):
    defaults = "defaults: [override hydra/job_logging: none, override hydra/hydra_logging: none, _self_]\n"
    (tmp_path / "job.yaml").write_text(f"{defaults}run_id: none\nhydra: {{output_subdir: null, run: {{dir: .}}}}\n")
    return tmp_path


def test_a_job_gets_plain_data_and_lists_stay_one_text(configs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job.py", "run_id=a,b"])
    seen = []
    entry.start(seen.append, configs, "job")
    assert seen == [{"run_id": "a,b"}]
    assert type(seen[0]) is dict


def test_a_users_mistake_is_one_line_and_status_2(configs, monkeypatch, capsys):
    def job(_config):
        raise UserError("no such run; give another")

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        entry.start(job, configs, "job")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such run; give another\n"


def test_without_tracking_a_result_is_made_and_not_logged():
    made = []
    entry.log_derived("probe", "a probe", UNTRACKED, None, made.append, system_metrics=False)
    assert made == ["sqlite:///x.db"]


def test_a_note_has_whole_lines_that_fit_a_tag():
    (short,) = entry.note("a\nb\n").values()
    (long,) = entry.note("\n".join(["x" * 99] * 200)).values()
    assert short == "a\nb"
    assert 7900 <= len(long) <= 8000
    assert set(long.split("\n")) == {"x" * 99}


def test_a_launcher_that_is_not_installed_is_one_line_with_the_package(monkeypatch):
    monkeypatch.setattr(entry, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=submitit_slurm needs .* pip install hydra-submitit-launcher"):
        entry.check_launcher(["-m", "hydra/launcher=submitit_slurm"])


def test_slurm_is_not_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(entry.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match="there is no sbatch here"):
        entry.check_launcher(["-m", "hydra/launcher=submitit_slurm"])
