"""The ways to build an environment agree with each other, and MLflow reads them as meant."""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from mlflow.projects import env_type
from mlflow.projects._project_spec import load_project
from mlflow.utils.environment import _PythonEnv
from mlflow.utils.requirements_utils import _parse_requirements
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")


def pins(lines: list[str]) -> dict[str, str]:
    """``name==version`` lines as a mapping; a line that says more or less than that fails."""
    found = {}
    for line in lines:
        name, version = line.split("==")
        found[canonicalize_name(name, validate=True)] = str(Version(version))
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


LOCK = pins(lines_of("requirements.lock"))
EVAL_LOCK = pins(lines_of("requirements-eval.lock"))
DEV_LOCK = pins([line for line in lines_of("requirements-dev.lock") if not line.startswith("-r ")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PYPROJECT["dependencies"]]
DEV = [Requirement(line) for line in PYPROJECT["optional-dependencies"]["dev"]]
EVAL = [Requirement(line) for line in PYPROJECT["optional-dependencies"]["eval"]]
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text())
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text())


def pixi_pins(table: dict[str, str]) -> dict[str, str]:
    return pins([name + version for name, version in table.items()])


def locked(requirements: list[Requirement], lock: dict[str, str]) -> dict[str, str]:
    return {canonicalize_name(r.name): lock[canonicalize_name(r.name)] for r in requirements}


def test_lock_keeps_the_promised_versions():
    assert LOCK["torch"] == "2.13.0"
    assert LOCK["nvidia-modelopt"] == "0.47.0"
    assert Version(LOCK["transformers"]) < Version("5.15")


def test_lock_names_no_build_of_torch():
    assert not [version for version in (LOCK | EVAL_LOCK | DEV_LOCK).values() if Version(version).local]


def test_dev_lock_adds_to_the_lock():
    assert lines_of("requirements-dev.lock")[0] == "-r requirements.lock"
    assert not (EVAL_LOCK.keys() | DEV_LOCK.keys()) & LOCK.keys()
    assert all(EVAL_LOCK[name] == DEV_LOCK[name] for name in EVAL_LOCK.keys() & DEV_LOCK.keys())


@pytest.mark.parametrize("requirement", DIRECT + DEV + EVAL, ids=str)
def test_lock_is_within_the_ranges_of_pyproject(requirement):
    version = (LOCK | EVAL_LOCK | DEV_LOCK)[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_conda_pins_the_direct_dependencies_as_locked():
    (pip_section,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert pip_section[0] == "-c requirements.lock"
    assert pins(pip_section[1:]) == locked(DIRECT, LOCK)


def test_pixi_pins_the_direct_dependencies_as_locked():
    assert pixi_pins(PIXI["pypi-dependencies"]) == locked(DIRECT, LOCK)
    assert pixi_pins(PIXI["feature"]["dev"]["pypi-dependencies"]) == locked(DEV, DEV_LOCK)


def test_every_file_means_the_same_python():
    candidates = [f"3.{minor}" for minor in range(9, 16)]
    for versions in (PYPROJECT["requires-python"], PIXI["dependencies"]["python"]):
        assert tuple(SpecifierSet(versions).filter(candidates)) == PYTHONS
    (conda,) = (entry for entry in CONDA["dependencies"] if str(entry).startswith("python="))
    assert conda.removeprefix("python=") in PYTHONS
    assert ".".join(map(str, sys.version_info[:2])) in PYTHONS


def test_mlflow_reads_conda_yaml_for_virtualenv_and_uv_as_our_pins():
    environment = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    parsed = list(_parse_requirements(environment.dependencies, is_constraint=False, base_dir=str(ROOT)))
    assert environment.python in PYTHONS
    assert environment.build_dependencies == ["pip", "setuptools", "wheel"]
    assert pins([entry.req_str for entry in parsed if not entry.is_constraint]) == locked(DIRECT, LOCK)
    assert pins([entry.req_str for entry in parsed if entry.is_constraint]) == LOCK


def test_lock_holds_all_that_the_dependencies_need():
    """Walks the requirements that the installed packages state.

    Those of torch that carry a marker are left out: they are the CUDA libraries of its CUDA builds.
    """
    todo, seen, missing = [*DIRECT, *DEV, *EVAL], set(), set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        if name == "pycosat":  # needs a C compiler, and no task here calls it
            continue
        if name not in LOCK | EVAL_LOCK | DEV_LOCK:
            missing.add(name)
            continue
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            if needed.marker is not None:
                applies = any(needed.marker.evaluate({"extra": extra}) for extra in wanted.extras or {""})
                if name == "torch" or not applies:
                    continue
            todo.append(needed)
    assert not missing


def test_tests_run_on_the_locked_versions():
    installed = {name: Version(importlib.metadata.version(name)).public for name in locked(DIRECT, LOCK)}
    assert installed == locked(DIRECT, LOCK)


def entry_point():
    return load_project(str(ROOT)).get_entry_point("main")


def arguments(parameters: dict[str, str]) -> list[str]:
    """The arguments of the script, as the shell would split MLflow's command."""
    return shlex.split(entry_point().compute_command(parameters, storage_dir=None))


def test_mlflow_loads_the_project():
    project = load_project(str(ROOT))
    assert project.name == "layerbits"
    assert project.env_type == env_type.CONDA
    assert Path(project.env_config_path) == ROOT / "conda.yaml"


def test_main_hands_every_parameter_to_the_script():
    script = arguments({"quant_pair": "wint8_afp16", "dataset_size": "large", "seed": "7"})
    assert script[:3] == ["PYTHONPATH=$PWD/src", "python", "experiments/sensitivity.py"]
    assert {"quant_pair=wint8_afp16", "dataset.size=large", "seed=7"} < set(script)
    assert len(script) == 3 + len(entry_point().parameters)


@pytest.mark.parametrize(
    "value", ["dataset.packing=padded seed=1", "dataset.path='/a b/c.txt'", "a={b:1}", "x=$HOME;ls"]
)
def test_overrides_reach_the_script_as_one_argument(value):
    assert arguments({"overrides": value})[-1] == f"+overrides={value}"


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path):
    """``make TARGET`` in a folder of its own, with a PYTHON whose ``-m venv`` and pip are fakes."""
    for name in ("Makefile", "requirements.lock", "requirements-eval.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        '  "-m venv") mkdir -p .venv/bin && cp python .venv/bin/python && touch .venv/made ;;\n'
        '  "-m pip") echo "$@" >> pip.log; test ! -e offline ;;\n'
        "esac\n"
    )
    (tmp_path / "python").chmod(0o755)

    def call(target: str, python: str = "./python") -> subprocess.CompletedProcess[str]:
        # These tests may themselves run under make, whose flags are not for this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", target, f"PYTHON={python}"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


@needs_make
@pytest.mark.parametrize("python", ["/no/such/python", "false"])
def test_make_asks_for_python_in_one_line(make, python, tmp_path):
    done = make("run", python)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith(f'Python 3.11, 3.12 or 3.13 is needed and "{python}" is none')
    assert not (tmp_path / ".venv").exists()


@needs_make
@pytest.mark.parametrize(
    ("has", "taken"),
    [
        ({"python3": "3.12", "python3.11": "3.11"}, "python3"),
        ({"python3": "3.13"}, "python3"),
        ({"python3": "3.9", "python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.14", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.10"}, None),
    ],
)
def test_make_takes_the_first_python_that_fits(has, taken, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "bin").mkdir()
    for name, version in has.items():
        script = tmp_path / "bin" / name
        told = f"import sys; sys.version_info = ({version.replace('.', ', ')}); "
        script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{told}$2"\necho "$0" >&2\nexit 3\n')
        script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for there in ("python3.11", "python3.12", "python3.13"):  # what this machine has beside them is no candidate
        if there not in has:
            (tmp_path / "bin" / there).write_text("#!/bin/sh\nexit 1\n")
            (tmp_path / "bin" / there).chmod(0o755)
    done = subprocess.run(
        ["make", ".venv/run.stamp"], cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    if taken is None:
        assert 'Python 3.11, 3.12 or 3.13 is needed and "python3" is none' in done.stderr
    else:
        assert f"{tmp_path / 'bin' / taken}" in done.stderr


@needs_make
def test_make_does_not_install_twice(make, tmp_path):
    assert make(".venv/test.stamp").returncode == 0
    calls = (tmp_path / "pip.log").read_text()
    assert "-r requirements-dev.lock" in calls
    assert make(".venv/test.stamp").returncode == 0
    assert (tmp_path / "pip.log").read_text() == calls


@needs_make
def test_make_starts_afresh_after_an_install_that_failed(make, tmp_path):
    (tmp_path / "offline").touch()
    assert make(".venv/run.stamp").returncode != 0
    assert not (tmp_path / ".venv/run.stamp").exists()
    (tmp_path / "offline").unlink()
    (tmp_path / ".venv/leftover").touch()
    assert make(".venv/run.stamp").returncode == 0
    assert not (tmp_path / ".venv/leftover").exists()


@needs_make
def test_make_rebuilds_when_the_lock_changes(make, tmp_path):
    assert make(".venv/run.stamp").returncode == 0
    stamp = tmp_path / ".venv/run.stamp"
    (tmp_path / ".venv/leftover").touch()
    after = stamp.stat().st_mtime + 1
    os.utime(tmp_path / "requirements.lock", (after, after))
    assert make(".venv/run.stamp").returncode == 0
    assert not (tmp_path / ".venv/leftover").exists()
