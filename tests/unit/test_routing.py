"""Tokens per expert: what is counted, warned of and drawn."""

import dataclasses

import numpy as np
import pytest

from layerbits.figures.run import tokens_per_expert
from layerbits.report import markdown_report, note
from layerbits.results.manifest import from_manifest, to_manifest
from layerbits.results.result import Group, costs, effective_bits
from layerbits.results.routing import FLOOR, Routing, coverage, coverage_warnings
from layerbits.tracking.contract import metrics

ROUTING = (
    Routing("B00.experts", 0, (64, 64, 0, 40), (100, 100, 16, 8)),
    Routing("B01.experts", 1, (50, 50, 50, 18), (50, 50, 60, 64)),
)


def test_starved_and_unseen_experts_are_counted_by_phase():
    calibration, scoring = coverage(ROUTING)
    assert (calibration.experts, calibration.unseen, calibration.starved, calibration.least) == (8, 1, 2, 0)
    assert (scoring.unseen, scoring.starved, scoring.least, scoring.median) == (0, 2, 8, 55.0)
    assert scoring.factor == FLOOR / 8


def test_a_warning_names_the_size_that_would_do():
    calibration, scoring = coverage_warnings(ROUTING, 16)
    assert "at least 512 captions" in calibration
    assert " 64 captions" in scoring
    assert "range of the others" in scoring


def test_there_is_no_warning_where_every_expert_saw_enough():
    assert coverage_warnings([Routing("B00.experts", 0, (), (FLOOR, FLOOR + 1))], 16) == ()


def test_report_note_manifest_and_metrics_tell_of_experts(make_result):
    plain = make_result()
    result = dataclasses.replace(plain, routing=ROUTING)
    report = markdown_report(result)
    assert "| scoring | 8 | 0 | 2 | 8 | 55 |" in report
    assert "routing.png" in report
    assert "experts in scoring: of 8 experts 0 saw no token and 2 fewer than 32" in note(result)
    assert from_manifest(to_manifest(result)).routing == ROUTING
    assert {key: value for key, value, _ in metrics(result)}["experts/scoring/starved"] == 2
    assert "Experts" not in markdown_report(plain)


def test_a_manifest_without_routing_is_read(make_result):
    data = to_manifest(make_result())
    del data["routing"]
    for key in ("effective_bits_active", "cost_model"):
        del data["recipe"][key]
    read = from_manifest(data)
    assert read.routing == ()
    assert np.isnan(read.allocation.effective_bits_active)
    assert read.allocation.cost_model == "weight"


def test_the_figure_has_a_panel_per_phase_and_the_floor():
    figure = tokens_per_expert(ROUTING)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == [
        "calibration: tokens per expert",
        "scoring: tokens per expert",
    ]
    (line,) = panels[1].patches
    np.testing.assert_array_equal(line.get_data().values, [1.5, 3.5])


def test_routed_experts_count_by_the_share_that_a_token_uses():
    groups = (Group("B00.o", 0, "o", ("a",), 100), Group("B00.experts", 0, "other", ("b",), 800, 0.125))
    assert costs(groups, "weight") == [100, 800]
    assert costs(groups, "active_moe") == [100, 100]
    assert effective_bits(groups, [16, 8], "active_moe") == pytest.approx(12)
    assert effective_bits(groups, [16, 8], "weight") == pytest.approx(80 / 9)
