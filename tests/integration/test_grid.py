"""A grid from its command line: children, aliases, refusals, and what a second start does."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from .entries import start

ROOT = Path(__file__).resolve().parents[2]


def run_grid(store, out, *arguments):
    return start("grid", f"tracking.uri={store}", f"output_root={out}", *arguments)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """One grid of five cells, run twice."""
    folder = tmp_path_factory.mktemp("grid")
    store = f"sqlite:///{folder}/mlflow.db"
    arguments = [
        "quant_pairs=wint8_afp16,wfp4_afp16",
        "quant_granularities=default,a_per_token_dynamic,w_per_tensor",
        "autoquant.seq_len=64",
    ]
    first = run_grid(store, folder / "out", *arguments)
    assert first.returncode == 0, first.stderr
    second = run_grid(store, folder / "out", *arguments)
    return store, first, second


def children(store):
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    return [r for r in runs if "mlflow.parentRunId" in r.data.tags], [
        r for r in runs if "mlflow.parentRunId" not in r.data.tags
    ]


def test_each_distinct_cell_is_scored_once(grid):
    scored = [r.info.run_name for r in children(grid[0])[0] if r.data.tags["outcome"] == "ok"]
    assert sorted(scored) == [
        "wfp4_afp16 default small smollm2_135m",
        "wint8_afp16 default small smollm2_135m",
        "wint8_afp16 w_per_tensor small smollm2_135m",
    ]


def test_an_overlay_that_changes_nothing_is_an_alias_of_the_first(grid):
    runs = children(grid[0])[0]
    (first,) = [r for r in runs if r.info.run_name == "wint8_afp16 default small smollm2_135m"]
    aliases = [r for r in runs if r.info.run_name == "wint8_afp16 a_per_token_dynamic small smollm2_135m"]
    assert [r.data.tags["alias_of"] for r in aliases] == [first.info.run_id]


def test_an_impossible_cell_is_refused_with_the_reason_while_the_rest_goes_on(grid):
    refused = [r for r in children(grid[0])[0] if r.data.tags["outcome"] == "unsupported"]
    assert {r.data.params["eff.granularity"] for r in refused} == {"w_per_tensor"}
    assert "FP4 weights need block scales" in refused[0].data.tags["reason"]


def test_a_second_start_skips_what_is_finished(grid):
    assert grid[2].returncode == 0, grid[2].stderr
    assert grid[2].stdout.count("skipped: finished in run") == 3
    assert "scoring:" not in grid[2].stderr
    first, second = sorted(children(grid[0])[1], key=lambda run: run.info.start_time)
    assert (first.info.status, first.data.tags["outcome"]) == ("FINISHED", "ok")
    assert (second.info.status, second.data.tags["outcome"]) == ("FINISHED", "skipped")
    assert second.data.tags["reason"] == "every cell that can be scored is finished already"


def test_the_summary_is_on_the_terminal_and_an_artifact_of_the_parent(grid):
    assert "wfp4_afp16" in grid[1].stdout
    parents = children(grid[0])[1]
    assert len(parents) == 2
    names = {a.path for a in MlflowClient(grid[0]).list_artifacts(parents[0].info.run_id, "grid")}
    assert names == {"grid/summary.csv", "grid/summary.html", "grid/summary.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quant_pairs="], "the grid is empty: give at least one value for quant_pairs"),
        (["quant_pairs=wfp8_afp8,wfp8_afp8"], "quant_pairs names wfp8_afp8 twice"),
    ],
)
def test_bad_grids_end_with_one_line(tmp_path, arguments, message):
    ended = run_grid(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_grid_with_a_failed_cell_ends_with_its_status(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    ended = run_grid(store, tmp_path, "quant_pairs=wint8_afp16", "autoquant.effective_bits=2")
    assert ended.returncode == 2
    assert "wint8_afp16 small failed: " in ended.stdout
    (cell,), (parent,) = children(store)
    assert [r.data.tags["outcome"] for r in (cell, parent)] == ["failed", "failed"]
