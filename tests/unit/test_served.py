"""What a runtime answered when it was asked for each layout, beside what its source says."""

import json

import pytest

from layerbits.checkpoint.runtimes import reads
from tools.docs import served
from tools.docs.served import Answer, read_served


@pytest.fixture(scope="module")
def labels(exportable_rows):
    return {(x.format, x.algo): x for row in exportable_rows for x in row.labels.values() if x is not None}


def test_every_label_was_asked(labels):
    assert set(read_served().asked) == set(labels)


def test_nothing_loads_that_the_runtimes_source_refuses(labels):
    told = read_served()
    assert [x.algo for x in labels.values() if told.answer(x).loads and not reads(x)] == []


def test_what_was_measured_loads_and_is_of_a_candidate_of_the_table(exportable_rows):
    told = read_served()
    shown = {(x.format, x.algo) for row in exportable_rows for x in row.labels.values() if x and _shown(told, x, row)}
    assert shown == set(told.damage)
    for key, damage in told.damage.items():
        assert told.asked[key].loads
        assert damage.noise < damage.served


def _shown(told, label, row):
    return told.measured(label, row.candidate.info.config_hash) is not None


def test_a_refusal_is_quoted_in_one_cell():
    told = str(Answer(False, f"ValueError: no | kernel\n{'word ' * 60}"))
    assert told.startswith('refused: "ValueError: no \\| kernel word')
    assert told.endswith(' …"')
    assert "\n" not in told
    assert str(Answer(True, plugin=True)) == "loads, with the tests' plugin"


def test_a_label_that_was_not_asked_has_no_answer(labels, monkeypatch, tmp_path):
    empty = {"runtime": "r", "processor": "p", "date": "d", "model": "m", "asked": {}, "served": {}}
    (tmp_path / "served.json").write_text(json.dumps(empty))
    monkeypatch.setattr(served, "DATA", tmp_path / "served.json")
    label = next(iter(labels.values()))
    assert read_served().answer(label) is None
    assert read_served().measured(label, "hash") is None
