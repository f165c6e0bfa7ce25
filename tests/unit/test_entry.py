"""Command lines as MLflow passes them, and what becomes of a job."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from layerbits import entry
from layerbits.errors import UserError
from layerbits.overrides import hydra_arguments


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
def script(tmp_path, monkeypatch):
    """An entry script of a small project."""
    defaults = "defaults: [override hydra/job_logging: none, override hydra/hydra_logging: none, _self_]\n"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "job.yaml").write_text(
        f"{defaults}run_id: none\nhydra: {{output_subdir: null, run: {{dir: .}}, sweep: {{dir: {tmp_path}/sweep}}}}\n"
    )
    monkeypatch.setattr(entry, "failed", [])
    yield str(tmp_path / "experiments" / "job.py")
    GlobalHydra.instance().clear()


def test_a_job_gets_plain_data_and_its_project_and_lists_stay_one_text(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job.py", "run_id=a,b"])
    seen = []
    entry.start(lambda config, root: seen.append((config, root)), script, "job")
    assert seen == [({"run_id": "a,b"}, tmp_path)]
    assert type(seen[0][0]) is dict


def test_known_lines_of_libraries_are_left_out_while_a_job_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job.py"])
    entry.start(lambda *_: print("Inserted 3 quantizers\nours"), script, "job")
    assert capsys.readouterr().out == "ours\n"


def test_a_users_mistake_is_one_line_and_status_2(script, monkeypatch, capsys):
    def job(_config, _root):
        raise UserError("no such run; give another")

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        entry.start(job, script, "job")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such run; give another\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run_ids=3", "there is no key run_ids in configs/job.yaml; did you mean run_id?"),
        ("id=3", "there is no key id in configs/job.yaml; choose one of run_id, deep"),
        ("siz=3", "there is no key siz in configs/job.yaml; did you mean deep.size?"),
        ("deep_size=3", "there is no key deep_size in configs/job.yaml; did you mean deep.size?"),
        ("deep.other=3", "there is no key deep.other in configs/job.yaml; choose one of deep.size"),
        ("+run_id=3", "Could not append to config. An item is already at 'run_id'."),
    ],
)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_key_that_does_not_exist_is_one_line_with_the_one_meant(
    script, tmp_path, monkeypatch, capsys, argument, message, sweep
):
    with (tmp_path / "configs" / "job.yaml").open("a") as file:
        file.write("deep: {size: 1}\n")
    monkeypatch.setattr(sys, "argv", ["job.py", argument, *sweep])
    with pytest.raises(SystemExit) as ended:
        entry.start(lambda _config, _root: None, script, "job")
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


def test_a_failed_job_of_a_multirun_leaves_the_others(script, monkeypatch, capsys):
    seen = []

    def job(config, _root):
        seen.append(config["other"])
        if config["other"] == 1:
            raise UserError("not this one")

    monkeypatch.setattr(sys, "argv", ["job.py", "+other=1,2", "-m"])
    with pytest.raises(SystemExit) as ended:
        entry.start(job, script, "job")
    assert (seen, ended.value.code) == ([1, 2], 2)
    assert "error: not this one\n" in capsys.readouterr().err


def test_a_launcher_that_is_not_installed_is_one_line_with_the_package(monkeypatch):
    monkeypatch.setattr(entry, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=submitit_slurm needs .* pip install hydra-submitit-launcher"):
        entry.check_launcher(["-m", "hydra/launcher=submitit_slurm"])


def test_slurm_is_not_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(entry.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match="there is no sbatch here"):
        entry.check_launcher(["-m", "hydra/launcher=submitit_slurm"])
