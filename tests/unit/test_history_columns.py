"""Columns that only some runs have: intervals, an unknown recipe; and the rows of schemes and probes."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa

from layerbits.history import rows
from layerbits.history.derived import scheme_rows
from layerbits.history.query import long_frame
from layerbits.history.source import RawRun
from layerbits.results.assignment import Assignment
from layerbits.results.intervals import Intervals
from layerbits.tracking import contract
from tests.integration.tracking_support import small_result


def with_intervals(result):
    """An interval of a tenth around each finite predicted KL, and two ranks around each rank."""
    kl = result.predicted_kl
    known = np.isfinite(kl)
    rank = np.where(known, 1 + np.argsort(np.argsort(-np.where(known, kl, -1.0), axis=0), axis=0), 0)
    low, high = (np.where(known, kl * factor, np.nan) for factor in (0.9, 1.1))
    tied = ((),) * len(kl)
    made = Intervals(0.9, 16, low, high, rank, np.where(known, rank + 2, 0), tied, 10, math.nan, math.nan)
    return replace(result, intervals=made)


def row(result):
    info = {"run_id": "a" * 32, "experiment_id": "7", "status": "FINISHED"}
    return rows.row_of(RawRun(info, contract.parameters(result), {}, contract.tags(result)))


def scores(*found):
    return long_frame(pa.Table.from_pylist(list(found), schema=rows.SCHEMA))


def check(frame):
    finite = np.isfinite(frame["predicted_kl"])
    assert finite.sum() == 11
    np.testing.assert_allclose(frame["low"][finite], 0.9 * frame["predicted_kl"][finite])
    np.testing.assert_allclose(frame["high"][finite], 1.1 * frame["predicted_kl"][finite])
    assert frame["rank_low"].dropna().tolist() == list(range(1, 12))
    assert frame["rank_high"].dropna().tolist() == list(range(3, 14))
    assert frame.loc[~finite, ["low", "high", "rank_low", "rank_high"]].isna().all(axis=None)


def test_intervals_come_with_the_tags_of_a_run():
    check(scores(row(with_intervals(small_result()))))


def test_intervals_come_with_the_table_where_a_run_has_no_tags(monkeypatch):
    result = with_intervals(small_result())
    monkeypatch.setattr(rows, "fetch", lambda _uri, _where, _path, to: to.write_text(contract.table(result)))
    bare = {**row(result), **dict.fromkeys(rows.LAYER_SCHEMA.names), "artifact_uri": "somewhere"}
    check(scores(rows.with_table("http://server", bare)))


def test_runs_without_intervals_have_the_columns_empty():
    frame = scores(row(small_result()), row(with_intervals(small_result(seed=1))))
    assert frame.loc[:11, ["low", "high", "rank_low", "rank_high"]].isna().all(axis=None)
    check(frame[12:])


def test_tags_of_runs_before_intervals_are_read():
    tags = contract.layer_tags(small_result())
    assert contract.read_layer_tags(tags)["low"] == [None] * 12


def test_a_recipe_that_is_not_known_is_missing_not_false():
    result = small_result()
    unknown = replace(result, allocation=replace(result.allocation, assignment=Assignment(), effective_bits=math.nan))
    assert scores(row(unknown))["chosen"].isna().all()
    table = json.loads(contract.table(unknown))
    assert {line[table["columns"].index("chosen")] for line in table["data"]} == {None}
    assert not scores(row(result))["chosen"].isna().any()


def test_a_derived_run_has_a_row_per_scheme():
    metrics = {"probe/top25/kl": 0.1, "probe/top25/bits": 9.0, "probe/a.random0/kl": 0.2, "seconds/probe": 3.0}
    params = {"eff.model": "tiny", "eff.kv_cache": "fp8"}
    run = RawRun({"run_id": "r", "start_time": 1}, params, metrics, {"source_run_id": "s"})
    found = [row for _, row in scheme_rows(run, "probe/")]
    assert [(r["scheme"], r["kl"], r.get("bits")) for r in found] == [("a.random0", 0.2, None), ("top25", 0.1, 9.0)]
    assert {(r["run_id"], r["source_run_id"], r["model"], r["kv_cache"]) for r in found} == {("r", "s", "tiny", "fp8")}


def test_the_price_of_a_kv_cache_is_a_column():
    info = {"run_id": "r", "experiment_id": "7", "status": "FINISHED"}
    run = RawRun(info, {}, {"summary/kv_cache_fp8_predicted_kl": 0.01}, {})
    found = rows.row_of(run)
    assert (found["kv_cache_fp8_predicted_kl"], found["kv_cache_nvfp4_predicted_kl"]) == (0.01, None)
