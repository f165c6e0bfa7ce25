"""What ``layerbits plan`` predicts, held against passes that were measured on GPUs (``benchmarks/results``)."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from layerbits.planning.table import Card

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def records():
    """The module of the script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plan_records

        yield plan_records
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def held(records):
    return records.held(Card.read())


def test_memory_is_predicted_within_five_percent(held):
    off = {(h.point.file, h.point.key): h.told_gb / h.gb - 1 for h in held}
    earlier = {key: value for key, value in off.items() if key[0].startswith("25-experts")}
    assert max(abs(value) for key, value in off.items() if key not in earlier) < 0.05
    assert max(map(abs, earlier.values())) < 0.07, "the first version of the code for experts"


@pytest.fixture(scope="module")
def unseen(records, held):
    """What is predicted of each pass by a table that is fitted to the others alone."""
    found = [h for h in held if not h.point.fitted]
    for left_out in (p for p in records.POINTS if p.fitted):
        points = tuple(replace(p, fitted=p.fitted and p != left_out) for p in records.POINTS)
        found += [h for h in records.held(records.fitted(points)) if h.point == left_out]
    return [h for h in found if h.point.cards == 1 and not math.isnan(h.told_seconds)]


def test_seconds_of_a_pass_are_predicted_from_the_others(unseen):
    off = {(h.point.file, h.point.key): h.told_seconds / h.seconds - 1 for h in unseen}
    experts = {key: value for key, value in off.items() if "experts" in key[0]}
    assert {h.point.mode for h in unseen} == {"fast", "lean"}
    assert max(abs(value) for key, value in off.items() if key not in experts) < 0.15
    assert max(map(abs, experts.values())) < 0.4, "two records: the same pass took 1.92 and 2.53 s"


def test_steps_of_the_grid_are_predicted_from_the_others(records):
    points, off = records.grid(), []
    for part in range(3):
        card = records.fitted(records.POINTS, [p for i, p in enumerate(points) if i % 3 != part])
        off += [(p.card_bound, p.told_seconds(card) / p.row["seconds"] - 1) for p in points[part::3]]
    assert max(abs(value) for bound, value in off if bound) < 0.15
    assert max(abs(value) for bound, value in off if not bound) < 0.25, "what the host takes varies"


def test_the_table_is_what_its_records_make(records):
    assert json.loads(records.TABLE.read_text()) == json.loads(json.dumps(asdict(records.fitted())))
