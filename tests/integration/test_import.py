"""Files of earlier tools become runs that history reads beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from layerbits import history, tracking
from layerbits.results.result import ModelInfo
from tests.integration.tracking_support import small_result, write_folder

from .entries import start

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"self_attn.q_proj": 2e-4, "self_attn.o_proj": 1e-4, "mlp.gate_proj": 0.5, "mlp.down_proj": 0.25}


def report(scheme, form, factor=1.0):
    layers = [
        {"layer": f"model.layers.{b}.{leaf}", "num_bits": 8.0, "sensitivity": s * factor / (b + 1), "size_cost": 400.0}
        for b in range(3)
        for leaf, s in SCORES.items()
    ]
    return {
        "scheme": {
            "name": scheme,
            "auto_quantize_bits": 8.5,
            "auto_quantize_method": "gradient",
            "auto_quantize_score_size": 64,
            "quant_formats": [form],
        },
        "model": {"id": "org/Tiny"},
        "autoquant_state": {"constraints": {"effective_bits": 8.25}, "score": 0.5},
        "layer_sensitivity": layers,
    }


def run_import(folder, path):
    return start(
        "import_results", f"path={path}", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}/out"
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Two reports and a torn one, imported twice."""
    folder = tmp_path_factory.mktemp("import")
    source = folder / "source"
    for name, data in (
        ("int8", report("wint8_afp16_lm", "INT8_WEIGHT_ONLY_CFG")),
        ("fp8", report("wfp8_afp8_lm", "FP8_DEFAULT_CFG", 10.0)),
    ):
        (source / name).mkdir(parents=True)
        (source / name / "per-layer-sensitivity.json").write_text(json.dumps(data))
    (source / "torn.json").write_text(json.dumps(data)[:80])
    return folder, run_import(folder, source), run_import(folder, source)


@pytest.fixture
def store(imported, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    yield f"sqlite:///{imported[0]}/mlflow.db"
    mlflow.set_tracking_uri(None)


def test_what_can_be_read_is_imported_and_the_rest_is_named(imported):
    _, first, _ = imported
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(" imported ") == 2
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("warning:")]
    assert "torn.json is not JSON or cut off" in line


def test_a_second_import_makes_no_run_of_the_same_file(imported, store):
    assert imported[2].returncode == 0, imported[2].stderr
    assert imported[2].stdout.count(" present ") == 2
    assert len(history.runs(tracking_uri=store)) == 2


def test_imported_runs_are_marked_and_what_is_unknown_is_missing(store):
    runs = history.runs(pair="wfp8_afp8", tracking_uri=store)
    (row,) = runs.to_dict("records")
    assert (row["source"], row["model"]) == ("imported", "tiny")
    assert row["score_sum"] == pytest.approx(10 * sum(SCORES.values()) * (1 + 1 / 2 + 1 / 3))
    assert (row["groups"], row["effective_bits_modelopt"], row["score_samples"]) == (12, 8.25, 64)
    missing = ("model_revision", "dataset", "seq_len", "config_hash", "effective_bits", "predicted_kl_sum", "engine")
    assert runs[list(missing)].isna().all(axis=None)


def test_scores_of_imported_runs_are_tidy(store):
    scores = history.scores(history.runs(pair="wint8_afp16", tracking_uri=store))
    assert set(scores["kind"]) == {"qkv", "o", "gate_up", "down"}
    assert scores[["layer", "rank"]].iloc[0].tolist() == ["B00.gate_up", 1]
    assert scores["score"].sum() == pytest.approx(sum(SCORES.values()) * (1 + 1 / 2 + 1 / 3))
    assert scores[["predicted_kl", "bits", "chosen", "low", "high", "rank_low", "rank_high"]].isna().all(axis=None)


def test_imported_runs_compare_by_rank_and_say_why_by_nothing_else(store):
    a, b = history.runs(tracking_uri=store)["run_id"]
    assert history.compare(a, b, "rank", tracking_uri=store).spearman == pytest.approx(1.0)
    by_score = history.compare(a, b, "score", tracking_uri=store)
    assert not by_score.comparable
    assert "model revision: unknown and unknown" in by_score.reasons


def test_an_imported_run_compares_with_one_of_ours_by_rank(store, tmp_path):
    ours = small_result(model=ModelInfo("tiny", "org/tiny", "c0ffee", "TinyForCausalLM", "float32"))
    run = tracking.push(write_folder(ours, tmp_path / "ours"), store, "mine")
    other = history.runs(pair="wint8_afp16", tracking_uri=store)["run_id"].iloc[0]
    found = history.compare(run, other, "rank", tracking_uri=store)
    assert (found.comparable, found.groups) == (True, 11)
    assert any(note.startswith("dataset: everyday and unknown") for note in found.notes)
    assert not history.compare(run, other, "predicted_kl", tracking_uri=store).comparable


def test_the_result_of_an_imported_run_comes_back(store):
    run_id = history.runs(pair="wint8_afp16", tracking_uri=store)["run_id"].iloc[0]
    with pytest.warns(UserWarning, match="without per-sample scores"):
        result = history.result(run_id, tracking_uri=store)
    assert (result.allocation.assignment, result.calibration.seq_len) == ((), None)


def test_recipes_of_imported_runs_are_in_no_pareto_front(store):
    with pytest.raises(Exception, match="has both bits and predicted_kl"):
        history.pareto(history.runs(tracking_uri=store))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON or cut off"), ('{"a": 1}', "is neither a quant manifest nor a per-layer report")],
)
def test_a_file_that_cannot_be_imported_ends_with_one_line(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content)
    ended = run_import(tmp_path, tmp_path / "file.json")
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "mlflow.db").exists()
