"""One rule says which runs may be compared, whether they are read from a manifest or from a tracking server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerbits.history.rows import row_of
from layerbits.history.source import RawRun
from layerbits.results.comparable import ONE_SCHEME, PREDICTED_KL, RANK, REPETITION, SCORE, Difference, facts, reasons
from layerbits.tracking import contract
from tests.integration.tracking_support import small_result

RULES = {"rank": RANK, "predicted_kl": PREDICTED_KL, "score": SCORE, "scheme": ONE_SCHEME, "repetition": REPETITION}


def test_a_result_and_its_row_in_the_history_say_the_same():
    result = small_result()
    row = row_of(
        RawRun({"run_id": "a" * 32, "experiment_id": "1"}, contract.parameters(result), {}, contract.tags(result))
    )
    found = facts(result)
    names = set(found) & set(row)
    assert {*SCORE.same, *REPETITION.same} <= names
    assert {name: found[name] for name in names} == {name: row[name] for name in names}


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, set()),
        ({"engine": "onepass", "device": "cuda"}, set()),
        ({"quant_pair": "wfp8_afp8"}, set()),
        ({"config_hash": "other"}, {"repetition"}),
        ({"dtype": "bfloat16"}, {"scheme"}),
        ({"groups_measured": "some"}, {"scheme"}),
        ({"seq_len": 256}, {"score", "scheme"}),
        ({"dataset_digest": "other"}, {"score", "scheme", "repetition"}),
        ({"method": "fisher"}, {"predicted_kl", "score", "scheme"}),
        ({"model_revision": "other"}, {"predicted_kl", "score", "scheme", "repetition"}),
    ],
)
def test_what_each_comparison_needs(change, refused):
    mine = facts(small_result())
    assert {name for name, rule in RULES.items() if reasons(mine, {**mine, **change}, rule)} == refused


def test_what_neither_says_is_not_the_same_but_for_formats_of_one_imported_search():
    result = small_result()
    unknown = facts(replace(result, calibration=replace(result.calibration, digest="")))
    assert reasons(unknown, unknown, SCORE) == [Difference("dataset_digest", None, None)]
    assert reasons(unknown, unknown, ONE_SCHEME) == []


def test_of_other_models_nothing_else_is_said():
    mine = facts(small_result())
    (reason,) = reasons(mine, {**mine, "model": "other", "model_revision": "another"}, SCORE)
    assert str(reason) == "model: tiny and other"
