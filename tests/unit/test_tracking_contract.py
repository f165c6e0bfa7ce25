"""What a result becomes in MLflow: names and values, without MLflow."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from layerbits.results.assignment import Assignment
from layerbits.results.bootstrap import with_intervals
from layerbits.results.manifest import from_manifest, to_manifest
from layerbits.results.result import Group
from layerbits.tracking import contract
from tests.integration.tracking_support import KINDS, small_result, write_folder


@pytest.fixture
def result():
    return small_result()


def values(result):
    return {key: value for key, value, step in contract.metrics(result) if step == 0}


def line(result, key):
    return [(step, value) for k, value, step in contract.metrics(result) if k == key]


def test_parameters_are_those_of_the_contract(result):
    assert contract.parameters(result) == {
        "eff.model": "tiny",
        "eff.model_revision": "c0ffee",
        "eff.weight_precision": "int8",
        "eff.activation_precision": "fp16",
        "eff.quant_pair": "wint8_afp16",
        "eff.format_name": "INT8_WEIGHT_ONLY_CFG",
        "eff.granularity": "default",
        "eff.config_hash": "ab12",
        "eff.dataset": "everyday",
        "eff.dataset_size": "small",
        "eff.dataset_digest": "d1" * 32,
        "eff.packing": "packed",
        "eff.seq_len": "128",
        "eff.batch_size": "2",
        "eff.calib_samples": "16",
        "eff.score_samples": "16",
        "eff.method": "gradient",
        "eff.engine": "stock",
        "eff.target_effective_bits": "12.0",
        "eff.cost_model": "weight",
        "eff.seed": "0",
        "eff.dtype": "float32",
        "eff.device": "cpu",
    }


def test_the_budget_of_a_tower_is_a_parameter_and_in_the_manifest(result):
    apart = replace(result, allocation=replace(result.allocation, vision_bits=12.5))
    assert contract.parameters(apart)["eff.vision_bits"] == "12.5"
    assert from_manifest(to_manifest(apart)).allocation.vision_bits == 12.5
    assert "vision_bits" not in to_manifest(result)["recipe"]
    assert from_manifest(to_manifest(result)).allocation.vision_bits is None


def test_summary_counts_and_sums(result):
    found = values(result)
    finite = result.scores[np.isfinite(result.scores)]
    assert found["summary/score_sum"] == pytest.approx(finite.sum())
    assert found["summary/predicted_kl_sum"] == pytest.approx(finite.sum() * 3e4)
    assert found["summary/score_chosen"] == 1e-7
    assert (found["summary/effective_bits"], found["summary/effective_bits_modelopt"]) == (12.0, 12.5)
    assert (found["summary/groups"], found["summary/quantized_groups"]) == (12, 6)


def test_nonfinite_scores_are_counted_and_left_out(result):
    keys = {key for key, _, _ in contract.metrics(result)}
    assert values(result)["summary/nonfinite"] == 1
    assert "score/B01.o" not in keys
    assert "score/B00.o" in keys
    assert [step for step, _ in line(result, "score_by_layer/o")] == [0, 2]
    assert all(math.isfinite(value) for _, value, _ in contract.metrics(result))


def test_lines_have_the_block_as_step(result):
    for kind in ("qkv", "gate_up", "down"):
        at = [i for i, group in enumerate(result.groups) if group.kind == kind]
        assert line(result, f"score_by_layer/{kind}") == [(b, result.scores[i]) for b, i in enumerate(at)]
        assert line(result, f"predicted_kl_by_layer/{kind}") == [(b, result.predicted_kl[i]) for b, i in enumerate(at)]


def test_several_groups_of_a_kind_in_a_block_are_summed():
    groups = (Group("B00.down.0", 0, "down", ("a",), 1), Group("B00.down.1", 0, "down", ("b",), 1))
    base = small_result()
    result = replace(
        base,
        groups=groups,
        scores=np.array([1.0, 2.0]),
        predicted_kl=np.array([4.0, np.nan]),
        allocation=replace(base.allocation, assignment=Assignment([None] * 2)),
    )
    assert line(result, "score_by_layer/down") == [(0, 3.0)]
    assert line(result, "predicted_kl_by_layer/down") == []  # a sum of a part would look like a sum


def test_a_group_outside_the_blocks_has_a_score_and_no_line():
    base = small_result(blocks=1)
    result = replace(
        base,
        groups=(*base.groups, Group("lm_head", None, "lm_head", ("lm_head",), 1)),
        scores=np.ones(5),
        predicted_kl=np.ones(5),
        allocation=replace(base.allocation, assignment=Assignment([None] * 5)),
    )
    assert values(result)["score/lm_head"] == 1
    assert values(result)["share/lm_head"] == pytest.approx(0.2)
    assert line(result, "score_by_layer/lm_head") == []


def test_shares_seconds_and_memory(result):
    found = values(result)
    assert sum(found[f"share/{kind}"] for kind in KINDS) == pytest.approx(1)
    assert (found["seconds/load"], found["seconds/score"], found["memory/peak_rss_gb"]) == (1.0, 2.5, 0.5)


def test_table_keeps_every_digit_and_has_null_for_infinity(result):
    table = json.loads(contract.table(result))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    by_layer = {row["layer"]: row for row in rows}
    assert [by_layer[g.key]["score"] for g in result.groups if g.key != "B01.o"] == [
        s for s in result.scores.tolist() if math.isfinite(s)
    ]
    assert by_layer["B01.o"]["score"] is None
    assert set(table["columns"]) >= {
        "block",
        "kind",
        "layer",
        "candidate",
        "score",
        "predicted_kl",
        "bits",
        "chosen",
        "rank",
    }


def with_captions(result, captions=16):
    parts = np.random.default_rng(0).gamma(2.0, size=(captions, *result.scores.shape))
    shares = parts / parts.sum(axis=0) * result.predicted_kl
    return with_intervals(replace(result, sample_kl=shares, sample_tokens=np.full(captions, 31)))


def test_table_and_tags_have_the_intervals_where_they_are_known(result):
    sure = with_captions(result)
    table = json.loads(contract.table(sure))
    columns = {"low", "high", "rank_low", "rank_high", "tied"}
    assert columns <= set(table["columns"])
    assert not columns & set(json.loads(contract.table(result))["columns"])
    plain = contract.read_layer_tags(contract.tags(sure))
    by_layer = {row["layer"]: row for row in sure.rows()}
    for i, layer in enumerate(plain["layer"]):
        row = by_layer[layer]
        if layer == "B01.o":  # its score is infinite
            assert (plain["low"][i], plain["rank_low"][i]) == (None, None)
        else:
            known = [name for name in contract.INTERVAL_COLUMNS if name in row]
            assert [plain[name][i] for name in known] == [row[name] for name in known]
    assert set(plain["image_share"]) == {None}  # its rows have no pictures


def test_the_stability_of_the_top_is_a_metric(result):
    sure = with_captions(result)
    found = values(sure)
    assert found["summary/rank_stability_top10"] == sure.intervals.top_overlap / 10
    assert found["summary/captions_for_stable_top10"] == sure.intervals.top_captions
    never = replace(sure, intervals=replace(sure.intervals, top_captions=math.inf))
    assert "summary/captions_for_stable_top10" not in values(never)
    assert "summary/rank_stability_top10" not in values(result)


def test_tags_say_versions_contract_and_pair(result):
    tags = contract.tags(result)
    assert tags["version.torch"] == "2.13.0"
    assert tags["deployable"] == "true"
    assert tags["outcome"] == "ok"
    assert tags["layerbits.schema_version"] == "1"
    assert tags["config_hash"] == "ab12"
    assert tags["mlflow.note.content"]


def test_dataset_digest_fits_mlflow(result):
    dataset = contract.dataset(result)
    assert dataset["digest"] == ("d1" * 32)[:36]
    assert json.loads(dataset["source"])["tags"]["digest"] == "d1" * 32


def test_result_id_follows_the_manifest(tmp_path):
    one = write_folder(small_result(), tmp_path / "one")
    same = write_folder(small_result(), tmp_path / "same")
    other = write_folder(small_result(seed=1), tmp_path / "other")
    assert contract.result_id(one) == contract.result_id(same) != contract.result_id(other)


def test_time_of_a_result():
    assert contract.milliseconds(small_result()) == 1772600767000
