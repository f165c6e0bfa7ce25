"""The store that is read: which one, its runs in pages, its artifacts, and what it says when it refuses."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from layerbits.errors import UserError
from layerbits.plain import JsonMapping
from layerbits.tracking.artifacts import found_beside
from layerbits.tracking.contract import SUMMARY
from layerbits.tracking.store import one_line, open_store
from layerbits.tracking.uris import is_server, redact, sqlite_database

if TYPE_CHECKING:
    from mlflow.entities import Run

_SEARCH = "/api/2.0/mlflow/runs/search"
_GRAPHQL = "/graphql"
_QUERY = """query Runs($input: MlflowSearchRunsInput!) { mlflowSearchRuns(input: $input) {
  apiError { message } nextPageToken
  runs {
    info { runId runName experimentId status startTime endTime artifactUri }
    data { params { key value } tags { key value } }
  }
} }"""
_HTTP_PAGE, _HTTP_PARALLEL = 50, 4
_DATABASE_PAGE = 1000
_ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class RawRun:
    """A run as the store has it; of its metrics perhaps the ``summary/…`` only."""

    info: Mapping[str, object]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def run_id(self) -> str:
        """Its id."""
        return str(self.info["run_id"])

    @property
    def facts(self) -> dict[str, object]:
        """What rows of a run made from others begin with."""
        return {
            "run_id": self.run_id,
            "run_name": self.info.get("run_name"),
            "source_run_id": self.tags.get("source_run_id"),
            "model": self.params.get("eff.model"),
            "start_time": self.info.get("start_time"),
        }


def connect(tracking_uri: str | None) -> str:
    """The URI of the store to read, after asking whether it answers.

    As :func:`~layerbits.tracking.store.open_store` decides, with the embedded store in the current folder; but a
    SQLite file that is missing is not made, and MLflow's own tracking URI stays what it was.

    Raises:
        UserError: There is no such store, or it does not answer, or refuses us.
    """
    wanted = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    file = sqlite_file(wanted)
    if file is not None and not file.exists():
        raise UserError(
            f"there are no runs at {file}; give the tracking URI of the runs (tracking_uri=, --tracking-uri or "
            "MLFLOW_TRACKING_URI), or run a job first"
        )
    with _unchanged():
        return open_store(wanted or None, Path.cwd(), read=True)


@contextmanager
def store_errors(uri: str, where: str | None = None) -> Iterator[None]:
    """Turns what MLflow raises into one line with what to change."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        code = error.error_code
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or " 403 " in str(error) or " 401 " in str(error):
            advice = (
                "refuses us; ask its owner for READ permission or set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        elif code == "INVALID_PARAMETER_VALUE" and where:
            advice = f"does not understand the filter {where!r} ({one_line(error)}); write it as for mlflow.search_runs"
        else:
            advice = f"cannot be read ({one_line(error)})"
        raise UserError(f"tracking store {redact(uri)} {advice}") from error


def experiment_id(uri: str, name: str) -> str:
    """Id of an experiment.

    Raises:
        UserError: There is none, or it was deleted.
    """
    from mlflow import MlflowClient

    with store_errors(uri):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            names = [e.name for e in client.search_experiments(max_results=200)]
            known = get_close_matches(name, names, n=3) or names[:5]
            raise UserError(f"no experiment {name} in {redact(uri)}; there are: {', '.join(known)}")
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name} is deleted; restore it with `mlflow experiments restore -x {experiment.experiment_id}` "
            f"(MLFLOW_TRACKING_URI={redact(uri)})"
        )
    return str(experiment.experiment_id)


def experiment_name(uri: str, run_id: str) -> str:
    """Name of the experiment that a run is in.

    Raises:
        UserError: There is no such run.
    """
    from mlflow import MlflowClient

    run = get_run(uri, run_id)
    with store_errors(uri):
        return str(MlflowClient(uri).get_experiment(str(run.info["experiment_id"])).name)


def search(
    uri: str, experiment: str, condition: str, read: Callable[[RawRun], T], few: bool = False, whole: bool = True
) -> list[T]:
    """All active runs that meet a filter, oldest first; pages are read in parallel.

    Args:
        uri: The store.
        experiment: Experiment id.
        condition: Filter of ``search_runs``.
        read: Takes what is wanted of a run, as soon as its page is there.
        few: One page is expected, so others are not asked for before it says that there are more.
        whole: All metrics are wanted, not only the ``summary/…``, which a server gives sooner.
    """
    for _ in range(_ATTEMPTS):
        by_id: dict[str, T] = {}
        pages = 0
        for page in _pages(uri, experiment, condition, few, whole):
            by_id |= {run.run_id: read(run) for run in page}
            pages += 1
        # A run that ends while pages are read shifts the rest by one, past a page that was read already.
        if pages == 1 or count_is(uri, experiment, condition, len(by_id), whole):
            return list(by_id.values())
    warnings.warn("runs came and went while they were read; one may be missing, ask again", stacklevel=3)
    return list(by_id.values())


def count_is(uri: str, experiment: str, condition: str, count: int, whole: bool = True) -> bool:
    """Whether exactly that many active runs meet a filter; costs the reading of one or two, as :func:`search` would."""
    page, more = _page(uri, experiment, condition, max(count - 1, 0), 1, whole)
    return not more and len(page) == min(count, 1)


def get_run(uri: str, run_id: str) -> RawRun:
    """One run.

    Raises:
        UserError: There is none.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with store_errors(uri):
        try:
            return _of_entity(MlflowClient(uri).get_run(run_id))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"no run {run_id} in {redact(uri)}; `layerbits history` lists the runs") from None


def fetch(uri: str, artifact_uri: str, path: str, to: Path) -> None:
    """Downloads one artifact to exactly ``to``: no listing, so no name of the server's becomes a path here.

    Raises:
        UserError: It is missing, or cannot be read.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(found_beside(uri, artifact_uri), tracking_uri=uri)._download_file(path, str(to))
    except Exception as error:
        raise UserError(f"artifact {path} of {redact(artifact_uri)} cannot be read: {one_line(error)}") from error


def _pages(uri: str, experiment: str, condition: str, few: bool, whole: bool) -> Iterator[list[RawRun]]:
    size, parallel = (_HTTP_PAGE, 1 if few else _HTTP_PARALLEL) if is_server(uri) else (_DATABASE_PAGE, 1)
    with ThreadPoolExecutor(parallel) as pool:
        ahead: deque[Future[tuple[list[RawRun], bool]]] = deque()
        offset = 0
        while True:
            while len(ahead) < parallel:
                ahead.append(pool.submit(_page, uri, experiment, condition, offset, size, whole))
                offset += size
            page, more = ahead.popleft().result()
            yield page
            if not more:
                return


def _page(uri: str, experiment: str, condition: str, offset: int, size: int, whole: bool) -> tuple[list[RawRun], bool]:
    """Runs from ``offset`` on, and whether there are more after them."""
    from mlflow.utils.search_utils import SearchUtils

    token = SearchUtils.create_page_token(offset).decode() if offset else None
    order = ["attributes.start_time ASC"]  # new runs come last and move no page
    if not is_server(uri):
        from mlflow import MlflowClient

        page = MlflowClient(uri).search_runs(
            [experiment], condition, max_results=size, order_by=order, page_token=token
        )
        return [_of_entity(run) for run in page], bool(page.token)
    light = None if whole else _light_page(uri, experiment, condition, token, size, order)
    return light or _whole_page(uri, experiment, condition, token, size, order)


def _light_page(
    uri: str, experiment: str, condition: str, token: str | None, size: int, order: list[str]
) -> tuple[list[RawRun], bool] | None:
    """The same page without the metrics, from the GraphQL that MLflow's own UI uses and does not document.

    Half the work for the server, a fifth of the bytes.

    Returns:
        ``None`` where the server does not have it, refuses us, or a run does not have :data:`SUMMARY`.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    wanted = {"experimentIds": [experiment], "filter": condition, "maxResults": size, "orderBy": order}
    body = {
        "operationName": "Runs",
        "query": _QUERY,
        "variables": {"input": wanted | ({"pageToken": token} if token else {})},
    }
    try:
        answer = http_request(get_default_host_creds(uri), _GRAPHQL, "POST", json=body, max_retries=0)
        answered = json.loads(answer.text)["data"]["mlflowSearchRuns"]
        if answer.status_code != 200 or answered["apiError"] is not None:
            return None
        return [_of_graphql(run) for run in answered["runs"] or []], bool(answered["nextPageToken"])
    except (MlflowException, ValueError, KeyError, TypeError):
        return None  # the whole page says what is wrong, if anything is


def _of_graphql(run: JsonMapping) -> RawRun:
    info, data = run["info"], run["data"]
    params, tags = ({i["key"]: i["value"] for i in data[kind] or []} for kind in ("params", "tags"))
    summary = {str(key): float(value) for key, value in json.loads(tags[SUMMARY]).items()}
    plain = {"run_id": info["runId"], "run_name": info["runName"], "experiment_id": info["experimentId"]}
    plain |= {"status": info["status"], "artifact_uri": info["artifactUri"]}
    times = {
        key: None if info[name] is None else int(info[name])
        for key, name in (("start_time", "startTime"), ("end_time", "endTime"))
    }
    return RawRun(plain | times, params, summary, tags)


def _whole_page(
    uri: str, experiment: str, condition: str, token: str | None, size: int, order: list[str]
) -> tuple[list[RawRun], bool]:
    # MLflow's client takes 3 ms to make objects of a run of 170 metrics, json less than one.
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    body = {"experiment_ids": [experiment], "filter": condition, "max_results": size, "order_by": order}
    answer = http_request(
        get_default_host_creds(uri), _SEARCH, "POST", json=body | ({"page_token": token} if token else {})
    )
    data = json.loads(verify_rest_response(answer, _SEARCH).text)
    return [_of_json(run) for run in data.get("runs", [])], bool(data.get("next_page_token"))


def _of_json(run: JsonMapping) -> RawRun:
    data = run.get("data", {})
    params, metrics, tags = ({i["key"]: i["value"] for i in data.get(k, [])} for k in ("params", "metrics", "tags"))
    return RawRun(run["info"], params, {key: float(value) for key, value in metrics.items()}, tags)


def _of_entity(run: Run) -> RawRun:
    return RawRun(dict(run.info), run.data.params, run.data.metrics, run.data.tags)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, which need not exist; empty = the embedded store in the current folder."""
    if not uri:
        return Path.cwd() / "mlflow.db"
    return sqlite_database(uri)


@contextmanager
def _unchanged() -> Iterator[None]:
    """Keeps MLflow's tracking URI, in this process and in the environment, what it was."""
    import mlflow

    variable = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = variable
