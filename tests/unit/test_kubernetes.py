"""The Kubernetes project makes the jobs that MLflow's backend would submit; no cluster, no client library."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from mlflow.projects._project_spec import load_project

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"


@pytest.fixture
def backend(monkeypatch):
    """MLflow's module, with the two client libraries that it imports left empty."""
    for name in ("docker", "kubernetes", "kubernetes.config", "kubernetes.config.config_exception"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["kubernetes.config.config_exception"].ConfigException = ValueError
    monkeypatch.delitem(sys.modules, "mlflow.projects.kubernetes", raising=False)
    import mlflow.projects.kubernetes as module

    yield module
    sys.modules.pop("mlflow.projects.kubernetes")


@pytest.mark.parametrize("name", ["main", "grid"])
def test_each_entry_point_becomes_a_job(name, backend):
    project = load_project(str(FOLDER))
    command = project.get_entry_point(name).compute_command({"overrides": "device=cpu seed=3"}, None)
    job = backend._get_kubernetes_job_definition(
        project.name, "registry/layerbits:abc", "sha256:0", backend._get_run_command([command]),
        {"MLFLOW_RUN_ID": "r"}, yaml.safe_load((FOLDER / "job.yaml").read_text()),
    )  # fmt: skip
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/layerbits:abc@sha256:0"
    assert container["command"][0] == "python", "there is no shell to set variables in"
    script = Path(container["command"][1]).relative_to("/opt/layerbits")
    assert (FOLDER.parents[1] / script).is_file()
    assert {"name": "MLFLOW_RUN_ID", "value": "r"} in container["env"]
    assert not any("{" in part for part in container["command"])


def test_the_job_scripts_take_the_projects_parameters():
    declared = yaml.safe_load((FOLDER.parents[1] / "MLproject").read_text())["entry_points"]
    for name, entry in yaml.safe_load((FOLDER / "MLproject").read_text())["entry_points"].items():
        for key, value in entry["parameters"].items():
            assert declared[name]["parameters"][key] == value


def test_the_backend_config_has_what_mlflow_asks_for():
    config = json.loads((FOLDER / "backend.json").read_text())
    assert set(config) == {"kube-context", "repository-uri", "kube-job-template-path"}
    assert (FOLDER / config["kube-job-template-path"]).is_file()


def test_the_image_holds_what_the_commands_need():
    text = (FOLDER / "Dockerfile").read_text()
    assert "WORKDIR /opt/layerbits" in text
    assert "PYTHONPATH=/opt/layerbits/src" in text
    assert subprocess.run(["git", "check-ignore", "-q", "requirements.lock"], cwd=FOLDER.parents[1]).returncode
