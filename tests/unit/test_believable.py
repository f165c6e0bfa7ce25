"""A predicted KL above ln(vocabulary) is marked wherever it is told, counted, and never drawn."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from layerbits import figures
from layerbits.history import query
from layerbits.history.rows import SCHEMA
from layerbits.report import json_report, markdown_report, note
from layerbits.results.baseline import BaselineLoss
from layerbits.results.frames import drawable, grid, tidy
from layerbits.results.manifest import from_manifest, to_manifest
from layerbits.tracking import contract

FAR = "B03.down"
GUESSING = math.log(384)


@pytest.fixture
def result(make_result):
    """A result of six blocks, one group of which is said to do 18,600 nats of damage a token."""
    made = make_result(blocks=6)
    kl, scores = made.predicted_kl.copy(), made.scores.copy()
    at = [g.key for g in made.groups].index(FAR)
    scores[at] *= 18_600 / kl[at]
    kl[at] = 18_600
    return replace(made, predicted_kl=kl, scores=scores, baseline=BaselineLoss(2.5, 384))


def row(result, key=FAR):
    return next(r for r in result.rows() if r["layer"] == key)


def test_rows_say_it(result):
    assert [r["layer"] for r in result.rows() if not r["believable"]] == [FAR]
    assert row(result)["rank"] == 1


def test_without_a_baseline_nothing_is_said(make_result):
    assert "believable" not in make_result().rows()[0]


def test_a_measured_kl_may_be_anything(result):
    measured = replace(result, method="kl_div")
    assert row(measured)["believable"]
    assert not measured.beyond.any()


def test_the_report_counts_names_and_marks_it(result):
    text = markdown_report(result)
    (line,) = [x for x in json_report(result)["attention"] if "not believable" in x]
    assert f"1 of 24 groups is above ln(384) = {GUESSING:.2f}" in line
    assert f"{FAR} 1.86e+04" in line
    assert line in text
    assert "18600 (not believable)" in text.replace(",", "").replace("1.86e+04", "18600")
    assert json_report(result)["candidates"][0]["not_believable"] == 1
    assert "not believable" in next(x for x in note(result).splitlines() if f"`{FAR}`" in x)


def test_the_loss_stands_beside_guessing(result):
    wanted = f"the unquantized model loses 2.50 nats per token, guessing ln(384) = {GUESSING:.2f}"
    assert wanted in note(result)
    assert wanted in markdown_report(result)
    assert json_report(result)["baseline"] == {"loss_per_token": 2.5, "vocabulary": 384, "guessing": GUESSING}


@pytest.mark.parametrize("draw", [figures.heatmap, figures.by_layer, figures.ranked_bars])
def test_figures_name_it_and_do_not_draw_it(result, draw):
    figure = draw(tidy(result))
    legend = [text.get_text() for found in figure.legends for text in found.get_texts()]
    assert any(f"not believable: {FAR}" in text for text in legend)
    assert max(max(ax.dataLim.xmax, ax.dataLim.ymax) for ax in figure.axes) < 100
    assert all(image.get_array().max() < 1 for image in figure.axes[0].images)


def test_a_grid_of_it_has_a_hole(result):
    cells = grid(tidy(result), "predicted_kl")
    assert (cells.unusable, cells.beyond) == ((FAR,), (FAR,))
    assert np.nanmax(cells.values) < 1
    assert np.nanmax(grid(tidy(result), "score").values) == result.scores.max()


def test_metrics_count_it_and_leave_it_out_of_the_chart(result):
    told = contract.metrics(result)
    scalars = {key: value for key, value, _ in told}
    assert scalars["summary/loss_per_token"] == 2.5
    assert scalars["summary/not_believable"] == 1
    assert scalars["summary/predicted_kl_sum"] > 18_600
    assert [step for key, _, step in told if key == "predicted_kl_by_layer/down"] == [0, 1, 2, 4, 5]
    assert [step for key, _, step in told if key == "score_by_layer/down"] == [0, 1, 2, 3, 4, 5]
    assert contract.parameters(result)["eff.vocabulary"] == "384"


def test_the_manifest_keeps_the_baseline(result):
    data = json.loads(json.dumps(to_manifest(result)))
    assert from_manifest(data).baseline == result.baseline
    del data["baseline"]  # of an earlier version
    assert from_manifest(data).baseline is None


def test_a_loss_that_is_no_number_is_kept_as_such(result):
    data = json.loads(json.dumps(to_manifest(replace(result, baseline=BaselineLoss(math.nan, 384))), allow_nan=False))
    assert math.isnan(from_manifest(data).baseline.loss_per_token)


def test_history_tells_it_from_the_vocabulary():
    layer = {field.name: [None] for field in SCHEMA if pa.types.is_list(field.type)}  # one, of which little is known
    runs = [
        {**layer, "run_id": name, "vocabulary": vocabulary, "method": name, "layer": ["B00.o"], "predicted_kl": [kl]}
        for name, vocabulary, kl in [
            ("gradient", 384, 18_600.0), ("fisher", 384, 0.1), ("of before", None, 18_600.0), ("kl_div", 384, 18_600.0)
        ]
    ]  # fmt: skip
    frame = query.long_frame(pa.Table.from_pylist(runs, schema=SCHEMA)).set_index("run_id")
    assert frame["believable"].tolist() == [False, True, pd.NA, True]


def test_a_frame_that_does_not_say_is_drawn_as_it_is(result):
    frame = tidy(result).drop(columns="believable")
    assert drawable(frame, "predicted_kl").max() == 18_600
    unknown = tidy(result).assign(believable=pd.array([None] * 24, dtype="boolean"))
    assert drawable(unknown, "predicted_kl").max() == 18_600
