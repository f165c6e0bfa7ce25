"""The saved view of an experiment: MLflow's UI opened on the per-layer overlay of its runs.

MLflow 3.17 keeps the views that its UI saves as experiment tags and documents none of it. What is generated here was
read from a view saved by hand: the tag ``mlflow.sharedViewState.<key>`` holds JSON with ``name``, ``createdAt``,
``updatedAt`` (Unix milliseconds) and ``state``, which is ``deflate;`` and the base64 of the zlib-compressed JSON of the
page's state.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.results.result import KINDS, VISION_KINDS
from layerbits.tracking.store import impatient, one_line, open_store
from layerbits.tracking.uris import is_server, ui_address

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

KEY = "layerbits-2"
"""Key of the view. A view that shows something else gets another key: one that is there is never overwritten."""

_PREFIX = "mlflow.sharedViewState."
TAG = f"{_PREFIX}{KEY}"
NAME = "LayerBits: damage by block"
TITLES = {"o": "attention out", "gate_up": "gate and up"}
"""Titles of the charts of those kinds of linear whose name says too little."""

_BY_BLOCK = tuple(k for k in KINDS if k not in ("lm_head", *VISION_KINDS))  # which are in no block
_EARLIER = ("layerbits-1",)  # keys of views that earlier versions saved
_LINES = "Predicted KL by block (nats per token)"
_BARS = "Whole model"
# Sections named as the first part of a metric take every chart of it that the UI makes by itself; they stay closed.
_CLOSED = ("share", "score_by_layer", "summary", "score", "seconds", "memory")
# Columns of the list and their widths in pixels: names are longer than the UI's 100.
_COLUMNS = {
    "params.`eff.quant_pair`": 130,
    "params.`eff.granularity`": 130,
    "metrics.`summary/effective_bits`": 160,
    "metrics.`summary/score_sum`": 160,
    "metrics.`summary/predicted_kl_sum`": 190,
}
_FIXED_COLUMNS = {"attributes.`Run Name`": 320, "runDateAndNestInfo": 150, "duration": 90}


def view_path(experiment_id: str) -> str:
    """Path of the view below the address of the UI."""
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={KEY}"
    return f"/#/experiments/{experiment_id}/runs?{query}"


def ensure_view(client: MlflowClient, experiment_id: str) -> str | None:
    """Saves the view in an experiment that does not have it.

    Args:
        client: An ``mlflow.MlflowClient``.
        experiment_id: Where.

    Returns:
        :func:`view_path`, or ``None`` where the store did not take it: a run goes on without the view.
    """
    try:
        with impatient():
            if TAG not in client.get_experiment(experiment_id).tags:
                client.set_experiment_tag(experiment_id, TAG, encoded(view_state(), int(time.time() * 1000)))
    except Exception as error:
        logging.getLogger(__name__).warning("no saved view in the UI: %s", one_line(error))
        return None
    return view_path(experiment_id)


def print_view(client: MlflowClient, uri: str, experiment_id: str) -> None:
    """Prints the link of an experiment's view, which is saved where it is missing.

    Args:
        client: An ``mlflow.MlflowClient`` of the store.
        uri: The store.
        experiment_id: Of a run that has its result.
    """
    if path := ensure_view(client, experiment_id):
        print(f"compare runs: {ui_address(uri)}{path}", flush=True)


def view_links(client: MlflowClient, address: str) -> dict[str, str]:
    """Experiment name → address of its view, for those that have one, the last changed first.

    Those with a view of an earlier version get that of this one.

    Args:
        client: An ``mlflow.MlflowClient``.
        address: Of the UI, ``http://host:port``.
    """
    links = {}
    for experiment in _viewed(client):
        if path := ensure_view(client, experiment.experiment_id):
            links[experiment.name] = address.rstrip("/") + path
    return links


def print_links(address: str, tracking_uri: str | None = None) -> None:
    """Prints the views of a store.

    Args:
        address: Of the UI on a database; a server has its own.
        tracking_uri: The store, as :func:`~layerbits.tracking.store.open_store` takes it; the embedded one is that of
            the current folder.

    Raises:
        UserError: The store cannot be used.
    """
    uri = open_store(tracking_uri, Path.cwd(), read=True)
    from mlflow import MlflowClient

    links = view_links(MlflowClient(), ui_address(uri) if is_server(uri) else address)
    for name, link in links.items():
        print(f"{name}: {link}")
    if not links:
        print("no experiment has a run with a result yet")


def _viewed(client: MlflowClient) -> list[Experiment]:
    experiments_by_id: dict[str, Experiment] = {}
    for key in (KEY, *_EARLIER):  # MLflow's filters have no OR
        experiments = client.search_experiments(filter_string=f"tags.`{_PREFIX}{key}` LIKE '%'")
        experiments_by_id |= {experiment.experiment_id: experiment for experiment in experiments}
    return sorted(experiments_by_id.values(), key=lambda experiment: experiment.last_update_time or 0, reverse=True)


def encoded(state: dict[str, object], milliseconds: int) -> str:
    """A page's state as the value of the tag, saved at ``milliseconds`` of Unix time."""
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 9)).decode()
    times = {"createdAt": milliseconds, "updatedAt": milliseconds}
    return json.dumps({"name": NAME, **times, "state": f"deflate;{packed}"})


def view_state() -> dict[str, object]:
    """The state of the UI's runs page: overlays first, then bars, then what else there is in closed sections."""
    charts = [_line(kind) for kind in _BY_BLOCK]  # those that no run has are hidden
    charts += [_chart("BAR", "bars", f"summary/{name}", name) for name in ("predicted_kl_sum", "effective_bits")]
    sections = [
        _section("lines", _LINES, columns=2, cardHeight=320),
        _section("bars", _BARS, columns=2),
        *(_section(name, name, display=False) for name in _CLOSED),
        _section("system", "System metrics", display=False),
    ]
    return {
        # Runs with a result and no others: parents of a grid have no lines, and hide their children.
        "searchFilter": "metrics.`summary/groups` > 0",
        # Newest first. By `attributes.start_time`, as it says itself, the UI folds runs away below their parents.
        "orderByKey": "attributes.`Created`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": ["attributes.`Run Name`", *_COLUMNS, "runDateAndNestInfo", "duration"],
        "columnWidths": {**_FIXED_COLUMNS, **_COLUMNS},
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,  # or the sections are sorted by name
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _section(key: str, name: str, display: bool = True, **layout: int) -> dict[str, object]:
    uuid = f"layerbits-{key}"
    flags = {"display": display, "isReordered": False, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "name": name, **flags, **layout}


def _chart(kind: str, section: str, metric: str, title: str) -> dict[str, object]:
    return {
        "uuid": f"layerbits-{metric}",
        "type": kind,
        "runsCountToCompare": 10,
        "metricSectionId": f"layerbits-{section}",
        "deleted": False,
        "isGenerated": False,
        "displayName": title,
        "metricKey": metric,
    }


def _line(kind: str) -> dict[str, object]:
    return {
        **_chart("LINE", "lines", f"predicted_kl_by_layer/{kind}", TITLES.get(kind, kind.replace("_", " "))),
        "selectedMetricKeys": [f"predicted_kl_by_layer/{kind}"],
        # Only a chart of a node's metrics shows a title of its own; with nothing but this it draws what others draw.
        "nodeLevelSystemMetricConfiguration": {"metric": kind, "type": "layerbits"},
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "log",  # pairs differ by orders of magnitude
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
