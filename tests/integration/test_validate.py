"""A validation from its command line, on a tiny checkpoint, with a SQLite store."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from layerbits.trust import agreement

from .entries import start
from .scoring_support import small_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model, and its validation with every ranker."""
    folder = tmp_path_factory.mktemp("validate")
    small_checkpoint(folder / "model", num_hidden_layers=3)
    store = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}/out"]
    scored = start(
        "sensitivity", "model=hf", f"model.path={folder}/model", "model.dtype=float32", "quant_pair=wint4_afp16",
        "autoquant.seq_len=32", "dataset.size=32", "autoquant.kv_cache=fp8+nvfp4", *store,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    client = MlflowClient(store[0].partition("=")[2])
    (source_run,) = client.search_runs(["1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "RESAMPLES", 40)  # intervals are tested on their own
        done = start("validate", f"run_id={source_run.info.run_id}", "disable_one=true", "rows=8", *store)
    assert done.returncode == 0, done.stderr
    (made,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'validate'")
    return {"folder": folder, "store": store, "source": source_run, "run": made, "text": done.stdout}


def frame(run):
    (file,) = run["folder"].glob("out/tmp/validation_*/validation.csv")
    rows = pd.read_csv(file)
    return rows[~rows["kind"].str.startswith("kv_")]


def test_each_group_is_measured_and_judged(run):
    rows = frame(run)
    assert len(rows) == 12
    assert (rows["status"] == "ok").all()
    assert (rows["measured_kl"] > 0).all()
    assert run["run"].data.metrics["validate/groups"] == 12


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_the_kv_cache_of_each_block_is_measured_beside_its_price(run, form):
    (file,) = run["folder"].glob("out/tmp/validation_*/validation.csv")
    rows = pd.read_csv(file)
    rows = rows[rows["kind"] == f"kv_{form}"]
    metrics = run["run"].data.metrics
    assert list(rows["block"]) == [0, 1, 2]
    assert (rows["measured_kl"] > 0).all()
    summed = run["source"].data.metrics[f"summary/kv_cache_{form}_predicted_kl"]
    assert rows["predicted_kl"].sum() == pytest.approx(summed)
    assert 0.3 < metrics[f"validate/kv_{form}/median_ratio"] < 3
    assert metrics[f"validate/kv_{form}/measured_kl_sum"] == pytest.approx(rows["measured_kl"].sum())
    assert metrics[f"validate/kv_{form}/measured_kl_together_se"] > 0
    assert run["run"].data.params["eff.kv_cache"] == "fp8+nvfp4"
    assert f"| {form} | 3 of 3 |" in run["text"]


def test_the_run_is_linked_to_the_one_that_it_judges(run):
    assert run["run"].data.tags["source_run_id"] == run["source"].info.run_id
    assert run["run"].data.tags["outcome"] == "ok"


def test_scores_computed_anew_are_the_recorded_ones(run):
    assert run["run"].data.metrics["validate/repeated_difference"] == 0


def test_every_ranker_is_ranked(run):
    metrics = run["run"].data.metrics
    for ranker in ("gradient", "gradient_token", "fisher", "kl_div", "weight_mse", "output_mse"):
        assert -1 <= metrics[f"validate/{ranker}/spearman"] <= 1
        assert ("validate/weight_mse/median_ratio" in metrics) is False
    assert metrics["validate/gradient/spearman"] == metrics["validate/spearman"]


def test_what_is_measured_on_other_rows_of_the_same_text_is_near(run):
    rows = frame(run)
    ratio = rows["kl_div"] / rows["measured_kl"]
    assert 0.7 < ratio.median() < 1.4


def test_the_noise_floor_is_far_below_in_float32(run):
    assert 0 < run["run"].data.metrics["validate/noise_floor"] < frame(run)["measured_kl"].min() / 10


def test_leaving_a_group_unquantized_saves_about_what_it_costs_alone(run):
    rows = frame(run)
    # damages of INT4 overlap in three blocks: together they are less than their sum
    assert 0.3 < (rows["saved_kl"] / rows["measured_kl"]).median() < 2


def test_the_report_names_intervals_and_the_worst(run):
    (file,) = run["folder"].glob("out/tmp/validation_*/validation.md")
    text = file.read_text()
    assert "## Misjudged most" in text
    assert "this run (gradient)" in text
    record = json.loads(file.with_suffix(".json").read_text())
    found = record["agreement"]["fisher"]["spearman"]
    assert found["low"] <= found["value"] <= found["high"] + 1e-9
    assert not math.isnan(found["low"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run_id=none"], "set run_id"),
        (["run_id=0123456789abcdef0123456789abcdef"], "0123456789abcdef0123456789abcdef"),
        (["rankers=magic"], "magic is no ranker"),
        (["kv_cache=int8"], "kv_cache=int8 is not known"),
        (["kv_cache=fp8_cast"], "did not score a KV cache of fp8_cast (it has fp8, nvfp4)"),
        (["rows=100000"], "rows"),
    ],
)
def test_bad_input_is_one_line(run, arguments, words):
    given = [f"run_id={run['source'].info.run_id}", *run["store"]]
    done = start("validate", *given, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
