"""The saved view: what it names exists, and it is written once and never in the way of a run."""

import base64
import json
import logging
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from layerbits.results.result import KINDS, VISION_KINDS
from layerbits.tracking import contract, view

NO_BLOCK = ("lm_head", *VISION_KINDS)


class Store:
    """What ``ensure_view`` needs of an MLflow client."""

    def __init__(self, **tags):
        self.tags = tags
        self.writes = 0

    def get_experiment(self, _):
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, _, key, value):
        self.tags[key] = value
        self.writes += 1


def state_of(tag):
    """As the UI reads it."""
    kind, _, packed = json.loads(tag)["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_tag_holds_the_state_as_the_ui_reads_it():
    tag = view.encoded(view.view_state(), 1234)
    envelope = json.loads(tag)
    assert (envelope["name"], envelope["createdAt"], envelope["updatedAt"]) == (view.NAME, 1234, 1234)
    assert state_of(tag) == view.view_state()
    assert len(tag) < 5000  # what every server takes as a tag


def test_overlays_come_first_then_the_bars():
    state = view.view_state()
    first, second = state["compareRunSections"][:2]
    charts = [(c["type"], c["metricSectionId"], c["metricKey"]) for c in state["compareRunCharts"]]
    assert charts == [
        *(("LINE", first["uuid"], f"predicted_kl_by_layer/{kind}") for kind in KINDS if kind not in NO_BLOCK),
        *(("BAR", second["uuid"], f"summary/{name}") for name in ("predicted_kl_sum", "effective_bits")),
    ]


def test_overlays_have_titles_that_fit():
    lines = [chart for chart in view.view_state()["compareRunCharts"] if chart["type"] == "LINE"]
    titles = {chart["metricKey"].rpartition("/")[2]: chart["displayName"] for chart in lines}
    assert titles["qkv"] == "qkv"
    assert titles["o"] == "attention out"
    assert len({*titles.values()}) == len(titles)
    assert max(map(len, titles.values())) < 20


def test_every_name_in_the_view_is_one_of_the_contract(make_result):
    result = make_result()
    first, *others = result.groups
    groups = [replace(first, key=kind, kind=kind, block=None if kind in NO_BLOCK else 0) for kind in KINDS]
    groups += others[len(KINDS) - 1 :]
    result = replace(result, groups=tuple(groups[: len(result.groups)]))
    metrics = {key for key, _, _ in contract.metrics(result)} | {"seconds/log"}
    metrics |= {
        f"predicted_kl_by_layer/{kind}" for kind in KINDS if kind not in NO_BLOCK
    }  # its kinds are not all of them
    parameters = contract.parameters(result)
    state = view.view_state()
    assert {chart["metricKey"] for chart in state["compareRunCharts"]} <= metrics
    known = {f"metrics.`{key}`" for key in metrics} | {f"params.`{key}`" for key in parameters}
    assert set(state["selectedColumns"]) <= known
    assert state["searchFilter"].rpartition(" > ")[0] in known
    # A metric without a section gets an open one at the end.
    placed = {chart["metricKey"] for chart in state["compareRunCharts"]}
    sections = {section["name"] for section in state["compareRunSections"]}
    assert {key.rpartition("/")[0] for key in metrics - placed} <= sections


def test_the_view_is_written_once():
    store = Store()
    path = view.ensure_view(store, "7")
    assert path.startswith("/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART&")
    assert path.endswith(f"viewStateShareKey={view.KEY}")
    assert view.ensure_view(store, "7") == path
    assert store.writes == 1
    assert state_of(store.tags[view.TAG]) == view.view_state()


def test_an_experiment_with_an_earlier_view_gets_this_one_and_keeps_that():
    class Client(Store):
        def search_experiments(self, filter_string):
            found = any(f"tags.`{tag}`" in filter_string for tag in self.tags)
            return [SimpleNamespace(experiment_id="7", name="old", last_update_time=None)] if found else []

    store = Client(**{"mlflow.sharedViewState.layerbits-1": "earlier"})
    assert view.view_links(store, "http://x/") == {"old": f"http://x{view.view_path('7')}"}
    assert store.tags["mlflow.sharedViewState.layerbits-1"] == "earlier"
    assert state_of(store.tags[view.TAG]) == view.view_state()


def test_a_view_that_somebody_changed_stays():
    store = Store(**{view.TAG: "mine"})
    assert view.ensure_view(store, "7")
    assert store.tags == {view.TAG: "mine"}


@pytest.mark.parametrize("error", [ConnectionError("no answer"), KeyError("tags"), PermissionError("read only")])
def test_a_store_that_does_not_take_it_is_only_told_of(error, caplog):
    class Broken(Store):
        def set_experiment_tag(self, *_):
            raise error

    with caplog.at_level(logging.WARNING):
        assert view.ensure_view(Broken(), "7") is None
    assert "no saved view in the UI" in caplog.text
