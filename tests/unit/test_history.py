"""What history makes of runs, without a store."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from layerbits import history
from layerbits.errors import UserError
from layerbits.history import checkpoints, query
from layerbits.history.cache import Cache
from layerbits.history.checkpoints import ExportedScheme
from layerbits.history.comparison import difference
from layerbits.history.rows import SCHEMA, is_later, row_of
from layerbits.history.source import RawRun
from layerbits.tracking import contract
from tests.integration.tracking_support import small_result


def raw_run(result, run_id="a" * 32, **tags):
    info = {
        "run_id": run_id,
        "run_name": result.run_name,
        "experiment_id": "7",
        "status": "FINISHED",
        "start_time": 1_772_600_000_000,
        "end_time": 1_772_600_060_000,
        "artifact_uri": "mlflow-artifacts:/7/a/artifacts",
    }
    metrics = {key: value for key, value, _ in contract.metrics(result)}
    return RawRun(info, contract.parameters(result), metrics, {**contract.tags(result), **tags})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))


# What the tags of a run hold


def test_layer_tags_read_back_to_the_last_bit_and_in_order_of_rank():
    result = small_result(36)
    tags = contract.layer_tags(result)
    assert len(tags) > 1
    assert max(len(value) for value in tags.values()) <= 5000
    found = contract.read_layer_tags(tags)
    rows = sorted(result.rows(), key=lambda row: row["rank"])
    for name in ("layer", "block", "kind", "predicted_kl", "chosen"):
        values = [math.nan if row[name] == math.inf else row[name] for row in rows]
        np.testing.assert_array_equal(found[name], values)
    assert found["score"][:-1] == [row["score"] for row in rows[:-1]]
    assert math.isnan(found["score"][-1])
    assert (found["candidate"], found["bits"]) == ("wint8_afp16", 8.0)


def test_eleven_layer_tags_are_joined_in_their_order():
    tags = contract.layer_tags(small_result(80))
    whole = "".join(tags.values())
    parts = {f"{contract.LAYERS}{i}": whole[i * 1000 : (i + 1) * 1000] for i in range(len(whole) // 1000 + 1)}
    assert len(parts) > 10
    assert repr(contract.read_layer_tags(parts)) == repr(contract.read_layer_tags(tags))


def test_a_run_without_layer_tags_has_none():
    assert contract.read_layer_tags({"outcome": "ok"}) is None


@pytest.mark.parametrize("damage", [lambda text: text[:-8], lambda text: "?" + text[1:], lambda text: "AAAA"])
def test_damaged_layer_tags_say_so(damage):
    (key, text), *_ = contract.layer_tags(small_result()).items()
    with pytest.raises(ValueError, match="damaged"):
        contract.read_layer_tags({key: damage(text)})


def test_the_damage_of_the_recipe_counts_quantized_groups_alone():
    result = small_result()
    metrics = {key: value for key, value, _ in contract.metrics(result)}
    chosen = [k for k, c in zip(result.predicted_kl, result.allocation.assignment, strict=True) if c]
    assert not np.isfinite(chosen).all()
    assert "summary/predicted_kl_chosen" not in metrics  # a part is not the sum
    finite = replace(result, predicted_kl=np.full_like(result.predicted_kl, 0.5))
    assert {k: v for k, v, _ in contract.metrics(finite)}["summary/predicted_kl_chosen"] == 3.0


# Rows


def test_a_run_becomes_a_row():
    result = small_result()
    row = row_of(raw_run(result))
    assert list(row) == SCHEMA.names
    assert (row["model"], row["quant_pair"], row["seq_len"], row["groups"]) == ("tiny", "wint8_afp16", 128, 12)
    assert row["score_sum"] == result.total("scores")
    assert len(row["layer"]) == 12


def test_what_a_run_does_not_say_is_missing():
    run = raw_run(small_result())
    row = row_of(RawRun(run.info, {"eff.seq_len": "unknown", "seed": "3"}, {}, {}))
    assert {row[name] for name in ("model", "seq_len", "seed", "score_sum", "outcome", "layer")} == {None}


def test_a_run_of_a_later_version_keeps_its_row_without_its_groups():
    row = row_of(raw_run(small_result(), **{"layerbits.schema_version": "99"}))
    assert is_later(row)
    assert (row["model"], row["layer"]) == ("tiny", None)


# The cache


def test_the_cache_gives_back_what_it_took():
    rows = [row_of(raw_run(small_result(seed=i), f"{i:032x}")) for i in range(3)]
    cache = Cache("http://server")
    cache.add(rows)
    expected = pa.Table.from_pylist(rows, schema=SCHEMA).to_pylist()
    found = {row["run_id"]: row for row in cache.with_groups([row["run_id"] for row in rows]).to_pylist()}
    for row in expected:
        for name in SCHEMA.names:
            np.testing.assert_array_equal(found[row["run_id"]][name], row[name])
    assert cache.runs("7").num_rows == 3
    assert cache.runs("8").num_rows == 0
    assert Cache("http://other").runs("7").num_rows == 0


@pytest.mark.parametrize(
    "change", [{"status": "RUNNING"}, {"outcome": "failed"}, {"schema_version": contract.SCHEMA_VERSION + 1}]
)
def test_the_cache_takes_only_what_will_not_change(change):
    cache = Cache("http://server")
    cache.add([{**row_of(raw_run(small_result())), **change}])
    assert cache.runs("7").num_rows == 0


def test_names_of_the_server_name_no_files(tmp_path):
    evil = "../../../evil"
    row = {**row_of(raw_run(small_result(), evil)), "experiment_id": evil, "run_name": evil, "artifact_uri": evil}
    cache = Cache(f"http://server/{evil}")
    cache.add([row])
    assert cache.runs(evil)["run_id"].to_pylist() == [evil]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent.parent for path in files] == [tmp_path / "cache" / "history" / "6"]


def test_a_damaged_file_of_the_cache_is_dropped(tmp_path):
    cache = Cache("http://server")
    cache.add([row_of(raw_run(small_result(seed=i), f"{i:032x}")) for i in (1, 2)])
    (file,) = (tmp_path / "cache").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    cache.add([row_of(raw_run(small_result(), "f" * 32))])
    assert cache.runs("7")["run_id"].to_pylist() == ["f" * 32]
    assert not file.exists()


def test_a_run_twice_in_the_cache_counts_once_and_with_its_groups():
    row = row_of(raw_run(small_result()))
    cache = Cache("http://server")
    cache.add([{**row, **dict.fromkeys(contract.LAYER_COLUMNS)}])
    cache.add([row])
    cache.add([{**row, **dict.fromkeys(contract.LAYER_COLUMNS)}])
    assert cache.runs("7").num_rows == 1
    cache.forget(["another"])
    assert cache.with_groups([row["run_id"]]).num_rows == 1


def test_many_files_become_one(tmp_path):
    cache = Cache("http://server")
    for i in range(42):
        cache.add([row_of(raw_run(small_result(blocks=1), f"{i:032x}"))])
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) < 5
    assert cache.runs("7").num_rows == 42


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "file"))
    cache = Cache("http://server")
    with pytest.warns(UserWarning, match="set LAYERBITS_CACHE"):
        cache.add([row_of(raw_run(small_result()))])
    assert cache.runs("7").num_rows == 0


# Filters


@pytest.fixture
def asked(monkeypatch):
    """The filters that an empty store is asked with, as MLflow reads them: a value by key."""
    from mlflow.utils.search_utils import SearchUtils

    filters = []

    def search(_uri, _experiment, condition, *_, **__):
        filters.append({clause["key"]: clause["value"] for clause in SearchUtils.parse_search_filter(condition)})
        return []

    monkeypatch.setattr(query, "connect", lambda _: "http://server")
    monkeypatch.setattr(query, "experiment_id", lambda *_: "0")
    monkeypatch.setattr(query, "search", search)
    return filters


@pytest.mark.parametrize("value", ["o'brien", 'the "big" one', "100% a_b", "x' OR tags.outcome = 'failed"])
def test_values_reach_the_filter_as_they_are(value, asked):
    assert history.runs(model=value).empty
    assert (asked[0]["eff.model"], asked[0]["outcome"]) == (value, "ok")


@pytest.mark.parametrize("value", ["both ' and \"", "back\\"])
def test_a_value_that_mlflow_cannot_search_for_says_so(value, asked):
    with pytest.raises(UserError, match="filter the frame instead"):
        history.runs(model=value)
    assert asked == []


@pytest.mark.parametrize(
    ("since", "milliseconds"),
    [
        ("2026-05-01", 1_777_593_600_000),
        ("2026-05-01T02:00+02:00", 1_777_593_600_000),
        (pd.Timestamp("2026-05-01"), 1_777_593_600_000),
    ],
)
def test_since_is_utc_unless_it_says_otherwise(since, milliseconds, asked):
    history.runs(since=since)
    assert asked[0]["start_time"] == milliseconds


@pytest.mark.parametrize("since", ["May the first", "", "2026-13-01"])
def test_since_that_is_no_date_says_so(since, asked):
    with pytest.raises(UserError, match="is no date"):
        history.runs(since=since)
    assert asked == []


# Which runs compare

SAME = row_of(raw_run(small_result()))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"dataset_digest": "e" * 64}, {"score"}),
        ({"packing": "padded"}, {"score"}),
        ({"seq_len": 256}, {"score"}),
        ({"batch_size": 4}, {"score"}),
        ({"calib_samples": 8}, {"score"}),
        ({"score_samples": 8}, {"score"}),
        ({"dataset_digest": None}, {"score"}),
        ({"method": "kl_div"}, {"score", "predicted_kl"}),
        ({"model_revision": "other"}, {"score", "predicted_kl"}),
        ({"model": "small"}, {"score", "predicted_kl", "rank"}),
        ({"quant_pair": "wfp8_afp8", "granularity": "per-token", "engine": "onepass"}, set()),
        ({}, set()),
    ],
)
def test_runs_compare_where_their_numbers_mean_the_same(change, refused):
    assert {by for by in ("score", "predicted_kl", "rank") if difference(SAME, {**SAME, **change}, by)[0]} == refused


def test_two_unknown_calibrations_are_not_the_same_one():
    unknown = {**SAME, "dataset_digest": None}
    assert difference(unknown, unknown, "score")[0] == ("dataset digest: unknown and unknown",)
    assert difference(unknown, unknown, "predicted_kl") == ((), ())


def test_random_weights_of_other_seeds_are_other_models():
    a, b = ({**SAME, "weights": "random", "seed": seed} for seed in (1, 2))
    assert difference(a, a, "score")[0] == ()
    assert "other seeds: 1 and 2" in difference(a, b, "rank")[0][0]


def test_a_difference_that_does_not_forbid_is_a_note():
    reasons, notes = difference(SAME, {**SAME, "dataset_size": "large", "seq_len": 512}, "predicted_kl")
    assert (reasons, notes) == ((), ("dataset size: small and large", "seq len: 128 and 512"))


# Recipes


def recipe_runs(points, **columns):
    rows = []
    for i, (bits, damage) in enumerate(points):
        own = {"run_id": f"{i}", "effective_bits": bits, "predicted_kl_chosen": damage, "score_chosen": damage / 2}
        rows.append({**SAME, **own, **{name: values[i] for name, values in columns.items()}})
    return pd.DataFrame(rows)


def test_pareto_is_what_no_other_beats():
    points = [(8, 3.0), (6, 5.0), (8, 2.0), (7, 5.0), (10, 2.0), (12, 0.5), (6, math.nan), (5, 9.0)]
    front = history.pareto(recipe_runs(points))
    assert list(zip(front["bits"], front["predicted_kl"], strict=True)) == [(5, 9.0), (6, 5.0), (8, 2.0), (12, 0.5)]
    for (bits, damage), (other_bits, other) in itertools.product(
        zip(front["bits"], front["predicted_kl"], strict=True), points
    ):
        assert not (other_bits <= bits and other < damage)


def test_best_scheme_has_the_least_damage_within_the_bits():
    runs = recipe_runs([(8, 3.0), (6, 5.0), (12, 0.5)], granularity=["default", "per-token", "default"])
    best = history.best_scheme(runs, 7)
    assert (best["run_id"], best["bits"], best["predicted_kl"]) == ("1", 6, 5.0)
    assert best["label"] == "wint8_afp16 per-token"
    assert history.best_scheme(runs, 12, by="score")["score"] == 0.25


def test_best_scheme_with_too_few_bits_says_how_many_there_are():
    with pytest.raises(UserError, match=r"the smallest has 6\.000"):
        history.best_scheme(recipe_runs([(8, 3.0), (6, 5.0)]), 4)


@pytest.mark.parametrize(
    ("columns", "by"),
    [
        ({"model": ["a", "b"]}, "predicted_kl"),
        ({"groups": [12, 13]}, "predicted_kl"),
        ({"dataset_digest": ["a", "b"]}, "score"),
    ],
)
def test_recipes_on_different_scales_are_refused(columns, by):
    with pytest.raises(UserError, match="not on one scale"):
        history.pareto(recipe_runs([(8, 3.0), (6, 5.0)], **columns), by)


def test_recipes_without_damage_are_refused():
    with pytest.raises(UserError, match="none of 1 runs"):
        history.pareto(recipe_runs([(8, math.nan)]))


# Exports


def test_an_export_is_its_folder_scheme_and_digest(monkeypatch):
    runs = [
        RawRun({}, {"eff.scheme_digest": "1a2b"}, {}, {"checkpoint.path": "/exports/low", "scheme": "low"}),
        RawRun({}, {"eff.scheme_digest": "3c4d"}, {}, {"scheme": "high"}),  # wrote no checkpoint
    ]
    monkeypatch.setattr(checkpoints, "search", lambda _uri, _experiment, _condition, read: [read(run) for run in runs])
    assert checkpoints.exported("http://server", "1") == [ExportedScheme(Path("/exports/low"), "low", "1a2b")]
