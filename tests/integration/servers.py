"""Real servers for the tests: PostgreSQL from Debian, ``mlflow server``, headless Chromium.

A test module gets the fixtures with ``pytest_plugins = ["tests.integration.servers"]``.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.tracking_support import ROOT, environment, free_port

BINARIES = Path("/usr/lib/postgresql")
CHROMIUM = shutil.which("chromium")
CHROMIUM_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# What MLflow 3.17 says to the console at all times: it asks who is logged in, of whom a server without users does not
# know; and a browser that is busy draws charts one frame later.
NOISE = ("/ajax-api/2.0/mlflow/users/current", "ResizeObserver loop completed with undelivered notifications")
# The UI opens its assistant on the first visit, over a quarter of the page.
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
PASSWORD = "of-a-test"


@dataclass
class Postgres:
    """A running PostgreSQL with a role ``layerbits``."""

    port: int
    folder: Path

    def database(self, name: str) -> str:
        """Creates a database; returns its URI."""
        self.run("createdb", "--owner", "layerbits", name)
        return self.uri(name)

    def uri(self, name: str) -> str:
        """URI of a database."""
        return f"postgresql+psycopg2://layerbits:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def run(self, program: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs a client program as the superuser."""
        command = [find(program), "--host", "127.0.0.1", "--port", str(self.port), "--username", "admin", *arguments]
        env = {**os.environ, "PGPASSWORD": PASSWORD}
        return subprocess.run(command, env=env, check=True, capture_output=True, **options)


def find(program: str) -> str | None:
    """Path of a PostgreSQL program: Debian keeps those of the server out of the PATH, one folder a version."""
    versions = sorted(BINARIES.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    return shutil.which(program, path=os.pathsep.join([*map(str, versions), os.environ["PATH"]]))


@contextlib.contextmanager
def running_postgres():
    """A PostgreSQL in a temporary folder, which answers on 127.0.0.1 only and asks for passwords."""
    # It refuses to run as root, and pytest's own folders are for the owner only.
    user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="layerbits-postgres-"))
    if user:
        shutil.chown(folder, "nobody")
    data, secret, port = folder / "data", folder / "password", free_port()
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    run = {"check": True, "capture_output": True, "cwd": folder, **user}
    try:
        initdb = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=admin", "--encoding=UTF8", "--no-locale"]
        subprocess.run([find("initdb"), *initdb, "--no-sync", data], **run)
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        # Not captured: the server keeps the pipe open.
        start = [find("pg_ctl"), "start", "-D", data, "-l", folder / "log", "-o", options, "--wait"]
        subprocess.run(start, **{**run, "capture_output": False, "stdout": subprocess.DEVNULL})
        try:
            server = Postgres(port, folder)
            server.run("psql", "-d", "postgres", "-c", f"CREATE ROLE layerbits LOGIN PASSWORD '{PASSWORD}'")
            yield server
        finally:
            subprocess.run([find("pg_ctl"), "stop", "-D", data, "-m", "immediate"], **run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class MlflowServer:
    """A running ``mlflow server``."""

    url: str
    log: Path
    processes: list = field(default_factory=list)


@contextlib.contextmanager
def running_mlflow(folder: Path, backend: str, *options: str, **variables: str):
    """``mlflow server`` with its artifacts in ``folder``; ``variables`` are added to its environment."""
    port = free_port()
    server = MlflowServer(f"http://127.0.0.1:{port}", folder / "server.log")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *options]
    env = environment(
        MLFLOW_BACKEND_STORE_URI=backend,
        MLFLOW_ARTIFACTS_DESTINATION=str(folder / "artifacts"),
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        **variables,
    )
    with server.log.open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(server, process)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(server: MlflowServer, process: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=2).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow server did not start:\n{server.log.read_text()}") from error
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="session")
def postgres():
    if find("initdb") is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def team_server(postgres, tmp_path_factory):
    """``mlflow server`` on PostgreSQL, artifacts through the server."""
    with running_mlflow(tmp_path_factory.mktemp("team"), postgres.database("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def chromium():
    """A headless browser."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A first visit; the page must not complain of anything."""
    context = chromium.new_context(viewport={"width": 1900, "height": 1250})
    context.set_default_timeout(60_000)
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and complaints.append(f"{said.text} {said.location['url']}"))
    yield page
    context.close()
    assert [text for text in complaints if not any(noise in text for noise in NOISE)] == []


@pytest.fixture
def shoot(page):
    """Keeps a screenshot, in outputs/screenshots or in the folder that LAYERBITS_SCREENSHOTS names."""
    folder = Path(os.environ.get("LAYERBITS_SCREENSHOTS", ROOT / "outputs" / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: page.screenshot(path=folder / f"{name}.png")
