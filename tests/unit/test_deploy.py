"""The team's server: what ``deploy/`` says agrees with itself, with the lock and with ``docs/server.md``."""

import configparser
import os
import re
import subprocess

import pytest
import yaml

from tests.integration.tracking_support import ROOT

DEPLOY = ROOT / "deploy"
DATABASE = "postgresql+psycopg2://mlflow:secret@127.0.0.1/mlflow"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture
def serve(tmp_path):
    """Runs ``deploy/serve`` with an ``mlflow`` that says what it was called with."""
    fake = tmp_path / "bin" / "mlflow"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)

    def run(**variables):
        env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", **variables}
        return subprocess.run([DEPLOY / "serve"], env=env, capture_output=True, text=True, check=False)

    return run


def variables(text):
    """Names that compose fills in from ``deploy/.env``, and whether it insists on them."""
    return {name: rest.startswith(":?") for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", text)}


def test_the_server_of_the_compose_file_has_what_serve_asks_for(compose, serve):
    server = compose["services"]["mlflow"]
    plain = {
        name: re.sub(r"\$\{\w+(?::-([^}]*))?[^}]*\}", lambda found: found[1] or "x", value)
        for name, value in server["environment"].items()
        if value is not None
    }
    assert plain["MLFLOW_AUTH_CONFIG_PATH"] == server["configs"][0]["target"]
    ready = serve(**plain | {"MLFLOW_AUTH_CONFIG_PATH": str(DEPLOY / "compose.yaml")})
    assert ready.stdout == "server --host 0.0.0.0 --port 5000 --workers 4 --app-name basic-auth\n", ready.stderr
    assert plain["MLFLOW_ARTIFACTS_DESTINATION"] in [mount.partition(":")[2] for mount in server["volumes"]]


def test_the_compose_file_names_only_what_it_defines(compose):
    services = compose["services"]
    assert set(services["mlflow"]["depends_on"]) <= set(services)
    mounts = [mount.partition(":")[0] for service in services.values() for mount in service["volumes"]]
    assert set(mounts) == set(compose["volumes"])
    assert {config["source"] for config in services["mlflow"]["configs"]} == set(compose["configs"])
    database = services["database"]["environment"]
    uri = services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert uri == "postgresql+psycopg2://{}:${{DATABASE_PASSWORD}}@database/{}".format(
        database["POSTGRES_USER"], database["POSTGRES_DB"]
    )
    auth = configparser.ConfigParser()
    auth.read_string(compose["configs"]["auth"]["content"])
    assert auth["mlflow"]["database_uri"] == uri
    assert auth["mlflow"]["default_permission"] == "EDIT"


def test_the_image_copies_files_that_are_there(compose):
    build = compose["services"]["mlflow"]["build"]
    copied = re.findall(r"^COPY (.+) \S+$", build["dockerfile_inline"], re.MULTILINE)
    files = [name for names in copied for name in names.split()]
    assert len(files) == 4
    assert all((DEPLOY / build["context"] / name).exists() for name in files)


def test_what_compose_insists_on_is_in_the_example(compose):
    insisted = [name for name, must in variables((DEPLOY / "compose.yaml").read_text()).items() if must]
    example = re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE)
    assert sorted(example) == sorted({*insisted, "DATABASE_PASSWORD"})


def test_the_server_has_the_versions_of_the_lock():
    wanted = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE))
    locks = (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-dev.lock").read_text()
    locked = dict(re.findall(r"^([\w-]+)==(\S+)$", locks, re.MULTILINE))
    assert set(wanted) == {"mlflow", "psycopg2-binary", "uvloop", "boto3"}
    assert {name: locked[name] for name in ("mlflow", "psycopg2-binary")}.items() <= wanted.items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MLFLOW_BACKEND_STORE_URI": ""}, "MLFLOW_BACKEND_STORE_URI is not set"),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://a@b/c"}, "must begin with postgresql+psycopg2://"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "artifacts"}, "absolute folder"),
        ({"MLFLOW_AUTH_CONFIG_PATH": "/nowhere/auth.ini"}, "cannot be read"),
        ({"MLFLOW_AUTH_CONFIG_PATH": __file__}, "MLFLOW_FLASK_SERVER_SECRET_KEY"),
    ],
)
def test_serve_says_in_one_line_what_is_missing(serve, changes, words):
    right = {"MLFLOW_BACKEND_STORE_URI": DATABASE, "MLFLOW_ARTIFACTS_DESTINATION": "/srv/artifacts"}
    assert serve(**right).stdout == "server --host 127.0.0.1 --port 5000 --workers 4\n"
    refused = serve(**right | changes)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert "secret" not in line


def test_the_processes_of_the_server_collect_garbage_seldom(serve, tmp_path):
    (tmp_path / "bin" / "mlflow").write_text("#!/bin/sh\npython3 -c 'import gc; print(gc.get_threshold())'\n")
    right = {"MLFLOW_BACKEND_STORE_URI": DATABASE, "MLFLOW_ARTIFACTS_DESTINATION": "/srv/artifacts"}
    assert serve(**right).stdout == "(50000, 20, 50)\n"


def test_a_server_for_everybody_without_users_is_warned_of(serve):
    right = {"MLFLOW_BACKEND_STORE_URI": DATABASE, "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/prefix"}
    open_to_all = serve(**right, MLFLOW_HOST="0.0.0.0")
    assert open_to_all.returncode == 0
    assert "can read, change and delete every run" in open_to_all.stderr


def test_every_variable_of_serve_is_explained():
    asked = set(re.findall(r"\$\{?(MLFLOW_\w+)", (DEPLOY / "serve").read_text()))
    told = (ROOT / "docs" / "server.md").read_text()
    assert asked - {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY"} <= set(
        re.findall(r"MLFLOW_\w+", told)
    )


@pytest.mark.parametrize(
    ("said", "package"),
    [
        ("| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |", "vllm==0.26.0"),
        ("| NVIDIA-SMI 590.44.01    KMD Version: 590.44.01    CUDA UMD Version: 13.1     |", "vllm==0.26.0"),
        ("| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |", None),
        ("No devices were found", None),
    ],
)
def test_vllm_is_the_one_that_fits_the_driver(tmp_path, said, package):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{said}'\n")
    smi.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "deploy" / "vllm-package"
    done = subprocess.run([script], env=path, capture_output=True, text=True, check=False)
    if package is None:
        assert done.returncode == 1
        assert "needs a driver for CUDA 13" in done.stderr
    else:
        assert done.stdout.strip() == package
    asked = subprocess.run([script], env={**path, "VLLM": "vllm==1.2.3"}, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "vllm==1.2.3"
