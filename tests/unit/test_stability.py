"""Agreement of rankings between runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from layerbits.errors import UserError
from layerbits.trust.stability import COLUMNS, around, difference_words, in_words, kendall, overlap, spearman, stability


@pytest.fixture
def two(make_result):
    """Two runs of one truth on other captions: the first with 16, the second with 200."""
    rng = np.random.default_rng(0)
    base = make_result(blocks=6)
    truth = base.predicted_kl

    def run(captions, seed, digest):
        shares = rng.gamma(1.5, size=(captions, len(truth))) / 1.5 * truth / captions
        kl = shares.sum(axis=0)
        data = replace(base.calibration, digest=digest, size=str(captions), score_samples=captions)
        tokens = np.full(captions, 12)
        fields = {"predicted_kl": kl, "scores": kl * 2, "sample_kl": shares, "sample_tokens": tokens}
        return replace(base, calibration=data, seed=seed, **fields)

    return {"a" * 32: run(16, 0, "d1" * 8), "b" * 32: run(200, 1, "d2" * 8)}


def test_rowwise_correlations_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, (2, 5, 20)).astype(float)
    for i in range(5):
        assert spearman(x, y)[i] == pytest.approx(spearmanr(x[i], y[i]).statistic)
        assert kendall(x, y)[i] == pytest.approx(kendalltau(x[i], y[i]).statistic)


def test_overlap_counts_what_both_have_on_top():
    x = np.array([[5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    y = np.array([[5.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert overlap(x, y, 2).tolist() == [1, 0]


def test_figures_of_a_pair_lie_in_their_intervals(two):
    (row,) = stability(two).to_dict("records")
    a, b = (r.predicted_kl for r in two.values())
    assert row["spearman"] == pytest.approx(spearmanr(a, b).statistic)
    assert row["kendall"] == pytest.approx(kendalltau(a, b).statistic)
    assert row["overlap"] == len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10]))
    for name in ("spearman", "kendall", "overlap"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["spearman_low"] < row["spearman_high"] <= 1


def test_more_captions_make_the_intervals_narrower(two):
    (few,) = stability(two).to_dict("records")
    many = {name: replace(result, **repeated(result, 20)) for name, result in two.items()}
    (more,) = stability(many).to_dict("records")
    assert more["spearman_high"] - more["spearman_low"] < few["spearman_high"] - few["spearman_low"]


def repeated(result, times):
    """The same scores from so many times the captions."""
    return {
        "sample_kl": np.tile(result.sample_kl, (times, 1)) / times,
        "sample_tokens": np.tile(result.sample_tokens, times),
    }


def test_what_differs_is_named(two):
    (row,) = stability(two).to_dict("records")
    assert row["differs"] == "seed: 0 and 1; size: 16 and 200; captions: d1d1d1d1d1d1 and d2d2d2d2d2d2; " + (
        "scored captions: 16 and 200"
    )
    assert difference_words(next(iter(two.values())), next(iter(two.values()))) == ""


def test_every_pair_of_runs_is_a_row(two):
    three = {**two, "c" * 32: next(iter(two.values()))}
    frame = stability(three)
    assert list(frame.columns) == list(COLUMNS)
    assert [(a[0], b[0]) for a, b in zip(frame["a"], frame["b"], strict=True)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert frame["differs"].iloc[1] == "nothing"
    assert frame["spearman"].iloc[1] == 1


def test_a_run_without_samples_has_figures_and_no_intervals(two):
    a, b = two
    frame = stability({a: two[a], b: replace(two[b], sample_kl=None, sample_tokens=None)})
    assert frame["spearman"][0] > 0
    assert np.isnan(frame["spearman_low"][0])
    assert in_words(frame)["spearman"][0] == f"{frame['spearman'][0]:.3f}"


def test_groups_without_a_finite_score_are_left_out(two):
    a, b = two
    bad = replace(two[a], predicted_kl=np.where(np.arange(24) == 3, np.nan, two[a].predicted_kl))
    (row,) = stability({a: bad, b: two[b]}).to_dict("records")
    assert row["groups"] == 23


def test_an_imported_run_is_compared_by_its_raw_scores(two):
    a, b = two
    imported = replace(two[b], predicted_kl=np.full(24, np.nan), sample_kl=None, sample_tokens=None)
    (row,) = stability({a: two[a], b: imported}).to_dict("records")
    assert row["spearman"] == pytest.approx(spearmanr(two[a].scores, two[b].scores).statistic)


def test_the_top_is_not_compared_where_there_are_no_more_groups(two):
    (row,) = stability(two, top=24).to_dict("records")
    assert np.isnan(row["overlap"])


def test_the_same_runs_give_the_same_intervals(two):
    assert stability(two).equals(stability(two))


def test_run_ids_are_whole_so_that_commands_take_them(two):
    frame = stability({"0123456789ab": two["a" * 32], "012345678cde": two["b" * 32]})
    shown = in_words(frame)
    assert (shown["a"][0], shown["b"][0]) == ("0123456789ab", "012345678cde")


def test_an_interval_is_put_around_the_figure():
    drawn = np.linspace(0.5, 0.7, 101)
    assert around(0.8, drawn, -1, 1) == pytest.approx((0.71, 0.89))
    assert around(0.99, drawn, -1, 1)[1] == 1


@pytest.mark.parametrize("count", [0, 1])
def test_one_run_is_not_enough(two, count):
    with pytest.raises(UserError, match="two or more"):
        stability(dict(list(two.items())[:count]))


def test_other_models_are_refused(two):
    a, b = two
    with pytest.raises(UserError, match="different models"):
        stability({a: two[a], b: replace(two[b], model=replace(two[b].model, name="other"))})


def test_a_top_of_no_groups_is_refused():
    with pytest.raises(UserError, match="top=0 compares no groups; use 1 or more"):
        stability({}, 0)
