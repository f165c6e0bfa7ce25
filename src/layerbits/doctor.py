"""Checks that this machine can run jobs and log them: store, artifacts, clock, disk, GPU, kernels, and serving."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path

from layerbits.cache import cache_dir
from layerbits.errors import Skipped, UserError
from layerbits.history.source import fetch, sqlite_file
from layerbits.tracking.artifacts import check_reachable
from layerbits.tracking.store import experiment_id, impatient, one_line, open_store
from layerbits.tracking.uris import is_server, redact

_FREE_BYTES = 10e9  # a checkpoint of a 4B model
_SKEW_SECONDS = 30.0
_BLOB = 1 << 20


@dataclass(frozen=True)
class Check:
    """One line of the list.

    Attributes:
        state: ``ok``, ``note`` (works, but know this) or ``fail``.
        detail: What was found, with what to change where it failed.
    """

    name: str
    state: str
    detail: str


def examine(tracking_uri: str | None = None) -> Iterator[Check]:
    """Makes the checks, one after the other; what needs the store is left out where that fails.

    Args:
        tracking_uri: The store, as :func:`~layerbits.tracking.store.open_store` takes it; the embedded one is that of
            the current folder.
    """
    uri, store = _store(tracking_uri)
    yield store
    if uri:
        yield _guarded("versions", lambda: _versions(uri))
        yield _guarded("artifacts", lambda: _artifacts(uri))
        if is_server(uri):
            yield _guarded("clock", lambda: _clock(uri))
    yield _guarded("disk", _disk)
    yield _guarded("gpu", _gpu)
    yield _guarded("kernels", _kernels)
    yield _guarded("serving", _serving)


def _store(tracking_uri: str | None) -> tuple[str | None, Check]:
    file = sqlite_file(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "")
    if file is not None and not file.exists():
        return None, Check("store", "note", f"{file} is not there yet; the first job makes it")
    try:
        uri = open_store(tracking_uri, Path.cwd())
    except UserError as error:
        return None, Check("store", "fail", str(error))
    return uri, Check("store", "ok", f"{redact(uri)} answers" + (" and takes our host name" if is_server(uri) else ""))


def _guarded(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # a check that cannot be made is a finding, not the end of the list
        return Check(name, "fail", one_line(error))


def _versions(uri: str) -> tuple[str, str]:
    ours = metadata.version("mlflow")
    if not is_server(uri):
        return "ok", f"mlflow {ours}, no server in between"
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with impatient():
        theirs = http_request(get_default_host_creds(uri), "/version", "GET").text.strip()
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return "ok", f"mlflow {ours} here, {theirs} on the server"
    if theirs.split(".")[0] == ours.split(".")[0]:
        return "note", f"mlflow {ours} here, {theirs} on the server; the saved view may not open, the rest works"
    return "fail", f"mlflow {ours} here, {theirs[:40]} on the server; install the same major version"


def _artifacts(uri: str) -> tuple[str, str]:
    """Uploads and downloads a megabyte in a run of a scratch experiment, and deletes both."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = experiment_id(f"layerbits-doctor-{uuid.uuid4().hex[:12]}")
    try:
        run = client.create_run(experiment).info
        check_reachable(uri, run)
        blob = os.urandom(_BLOB)
        with tempfile.TemporaryDirectory() as folder:
            file, back = Path(folder) / "blob.bin", Path(folder) / "back.bin"
            file.write_bytes(blob)
            start = time.perf_counter()
            client.log_artifact(run.run_id, str(file))
            fetch(uri, run.artifact_uri, file.name, back)
            took = time.perf_counter() - start
            same = back.read_bytes() == blob
        client.delete_run(run.run_id)
    finally:
        if uri.startswith("sqlite"):  # where this very experiment has a folder of its own
            shutil.rmtree(client.get_experiment(experiment).artifact_location, ignore_errors=True)
        client.delete_experiment(experiment)
    if not same:
        return "fail", "1 MB came back changed; look at what is between here and the artifact store"
    if is_server(uri) and not run.artifact_uri.startswith("mlflow-artifacts:"):
        place = redact(run.artifact_uri.rpartition("/artifacts")[0])
        return "note", f"1 MB there and back in {took:.2f} s, past the server: every client needs access to {place}"
    return "ok", f"1 MB there and back in {took:.2f} s"


def _clock(uri: str) -> tuple[str, str]:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with impatient():
        start = time.time()
        answer = http_request(get_default_host_creds(uri), "/health", "GET")
        here = (start + time.time()) / 2
    if "Date" not in answer.headers:
        return "note", "the server does not tell the time"
    skew = here - parsedate_to_datetime(answer.headers["Date"]).timestamp() - 0.5  # the header has whole seconds
    if abs(skew) <= _SKEW_SECONDS:
        return "ok", f"within {max(abs(skew), 1):.0f} s of the server's"
    side = "ahead of" if skew > 0 else "behind"
    return "fail", f"{abs(skew):.0f} s {side} the server's; since= and the order of runs go wrong: set the clock (NTP)"


def _disk() -> tuple[str, str]:
    state, parts = "ok", []
    for name, folder in (
        ("results", Path.cwd()),
        ("cache", cache_dir()),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            return "fail", f"{there} ({name}) cannot be written; set output_root or LAYERBITS_CACHE elsewhere"
        if free < _FREE_BYTES:
            state = "note"
        parts.append(f"{free / 1e9:.0f} GB for {name}")
    return state, ", ".join(parts) + ("" if state == "ok" else "; checkpoints of larger models need more")


def _gpu() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return "note", "none: jobs run on the CPU, which is fit for small models"
    torch.ones(1, device="cuda").add_(1).item()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free = torch.cuda.mem_get_info()[0] / 1e9
    return "ok", f"{len(names)} × {names[0]}, {free:.0f} GB free, PyTorch {torch.__version__}"


def _kernels() -> tuple[str, str]:
    import torch

    from layerbits.candidates.fp4 import cuda_kernels_available

    if cuda_kernels_available():
        return "ok", "ModelOpt's FP4 kernels can be built and run here"
    if torch.cuda.is_available():
        missing = "nvcc, ninja or a C++ compiler is missing"
        return "note", f"ModelOpt's FP4 kernels cannot be built ({missing}); NVFP4 and MXFP8 are slow"
    return "note", "no GPU: FP4 is computed by LayerBits' own kernels, equal bit for bit and slower"


def _serving() -> tuple[str, str]:
    """What the vLLM of this folder computes here."""
    from layerbits.serving.environment import find_environment, what_is_unknown
    from layerbits.serving.processor import ask, everything_as_written, summary

    try:
        environment = find_environment(None, Path.cwd())
    except Skipped as why:
        return "note", str(why)
    if unknown := what_is_unknown(environment):
        return "note", unknown
    processor = ask(environment)
    if processor is None:
        return "ok", f"{environment.package} {environment.version}; what it computes here, serve_check measures"
    state = "ok" if everything_as_written(processor) else "note"
    return state, f"{environment.package} {environment.version} on {summary(processor)}"
