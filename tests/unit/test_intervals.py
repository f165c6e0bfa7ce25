"""Intervals, ties and captions for a stable top, on synthetic captions whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from layerbits.errors import UserError
from layerbits.results.bootstrap import FEWEST, captions_for, intervals, ties, top_overlap, with_intervals
from layerbits.results.manifest import from_manifest, to_manifest


def captions(rng, count, means, shape=1.5):
    """Shares [count, G] and tokens [count] of captions with a long-tailed KL per token of these means."""
    tokens = rng.integers(5, 25, count)
    common = rng.gamma(2.0, 0.5, size=(count, 1))
    nats = rng.gamma(shape, 1 / shape, size=(count, len(means))) * common * means * tokens[:, None]
    return nats / tokens.sum(), tokens


@pytest.mark.parametrize("count", [16, 64])
def test_the_interval_covers_the_truth_as_often_as_it_says(count):
    rng = np.random.default_rng(1)
    means = np.array([1e-5, 1e-4, 2e-3, 5e-2])
    covered = []
    for seed in range(250):
        found = intervals(*captions(rng, count, means), resamples=500, seed=seed)
        covered.append((found.low <= means) & (means <= found.high))
    assert 0.85 <= np.mean(covered) <= 0.95


def test_the_range_of_a_rank_covers_the_true_rank():
    rng = np.random.default_rng(2)
    means = np.exp(np.linspace(-9, -6, 30))
    true = np.arange(30, 0, -1)
    covered = []
    for seed in range(40):
        found = intervals(*captions(rng, 32, means), resamples=500, seed=seed)
        covered.append((found.rank_low <= true) & (true <= found.rank_high))
    assert np.mean(covered) > 0.9


def test_equal_groups_are_tied_and_far_ones_are_not():
    rng = np.random.default_rng(3)
    shares, tokens = captions(rng, 64, np.array([1e-3, 1e-3, 1e-1]))
    found = intervals(shares, tokens)
    assert found.tied == ((1,), (0,), ())
    assert found.rank_low.tolist() == [2, 2, 1]
    assert found.rank_high.tolist() == [3, 3, 1]


def test_groups_that_never_differ_are_tied():
    drawn = np.tile(np.linspace(1, 2, 50)[:, None], 2)
    unsure, above = ties(drawn, drawn.mean(axis=0))
    assert [list(those) for those in unsure] == [[1], [0]]
    assert above.tolist() == [0, 0]


def test_what_two_groups_share_does_not_blur_their_order():
    rng = np.random.default_rng(4)
    tokens = np.full(40, 10)
    common = rng.gamma(0.5, 2.0, size=(40, 1))
    shares = common * np.array([1.0, 1.05]) * (1 + rng.normal(0, 0.01, (40, 2))) / 40
    found = intervals(shares, tokens)
    assert found.high[0] > found.low[1]  # the intervals overlap by far
    assert found.tied == ((), ())


def test_ties_are_listed_most_sensitive_first():
    rng = np.random.default_rng(5)
    shares, tokens = captions(rng, 16, np.array([1.0, 1.02, 0.98, 1.01]))
    order = np.argsort(-shares.sum(axis=0)).tolist()
    found = intervals(shares, tokens)
    for g, tied in enumerate(found.tied):
        assert list(tied) == [i for i in order if i in tied]
        assert found.rank_high[g] - found.rank_low[g] == len(tied)


def test_a_constant_kl_per_token_has_no_width_whatever_the_captions_lengths():
    tokens = np.random.default_rng(6).integers(1, 100, 30)
    shares = np.stack([tokens / tokens.sum() * kl for kl in (0.1, 0.3)], axis=1)
    found = intervals(shares, tokens)
    np.testing.assert_allclose(found.low, [0.1, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found.high, [0.1, 0.3], rtol=1e-6)


def test_the_same_captions_give_the_same_intervals():
    shares, tokens = captions(np.random.default_rng(7), 20, np.exp(np.linspace(-9, -5, 15)))
    one, two = intervals(shares, tokens), intervals(shares, tokens)
    np.testing.assert_array_equal(one.low, two.low)
    np.testing.assert_array_equal(one.high, two.high)
    assert (one.tied, one.top_captions) == (two.tied, two.top_captions)


def test_negative_shares_are_allowed():
    shares = np.random.default_rng(9).normal(0.1, 1.0, (12, 3)) / 12
    found = intervals(shares, np.full(12, 10))
    assert (found.low < 0).all()
    assert (found.low <= shares.sum(axis=0)).all()


def test_no_end_is_beyond_a_single_caption():
    shares, tokens = np.full((12, 1), 1e-6), np.full(12, 10)
    shares[3] = 1.0  # one caption makes nearly all of it
    found = intervals(shares, tokens)
    assert found.low[0] >= 12e-6 - 1e-12
    assert 1.0 < found.high[0] <= 12.0


def test_a_group_that_is_not_finite_has_no_interval_and_ties_with_nothing():
    shares, tokens = captions(np.random.default_rng(10), 16, np.array([1e-3, 1e-3, 1e-3]))
    shares[3, 1] = np.nan
    found = intervals(shares, tokens)
    assert np.isnan(found.low[1])
    assert (found.rank_low[1], found.rank_high[1]) == (0, 0)
    assert found.tied[1] == ()
    assert 1 not in found.tied[0]
    assert found.rank_high.max() <= 2


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_too_few_captions_give_no_intervals(count):
    assert intervals(*captions(np.random.default_rng(11), count, np.array([1e-3, 1e-2]))) is None


def test_captions_without_a_share_do_not_count():
    shares, tokens = captions(np.random.default_rng(12), FEWEST, np.array([1e-3, 1e-2]))
    empty = np.zeros((5, 2)), np.zeros(5, dtype=np.int64)
    found = intervals(np.concatenate([shares, empty[0]]), np.concatenate([tokens, empty[1]]))
    assert found.captions == FEWEST
    assert intervals(np.concatenate([shares[1:], empty[0]]), np.concatenate([tokens[1:], empty[1]])) is None


def normal_noise(rng, means, spread, count, resamples=3000):
    return rng.normal(size=(resamples, len(means))) * means * spread / np.sqrt(count)


def truly_common(rng, means, spread, count, top):
    """How many of the top two independent calibrations on so many captions have in common, by simulation."""
    sides = [means + normal_noise(rng, means, spread, count) for _ in range(2)]
    tops = [np.argsort(-side, axis=1)[:, :top] for side in sides]
    return np.mean([len(set(a) & set(b)) for a, b in zip(*(t.tolist() for t in tops), strict=True)])


def test_captions_for_a_stable_top_are_those_that_a_simulation_needs():
    rng = np.random.default_rng(13)
    means, spread, top = np.exp(-0.08 * np.arange(60)), 1.0, 10
    needed = next(m for m in range(16, 2000, 8) if truly_common(rng, means, spread, m, top) >= top - 1)
    estimates = []
    for _ in range(15):
        center = means + normal_noise(rng, means, spread, 64, 1)[0]
        estimates.append(captions_for(center, normal_noise(rng, means, spread, 64), top, 64))
    assert 0.5 < np.median(estimates) / needed < 2


def test_the_top_overlap_is_about_that_of_two_other_calibrations():
    rng = np.random.default_rng(14)
    means, spread, top = np.exp(-0.08 * np.arange(60)), 1.0, 10
    true = truly_common(rng, means, spread, 64, top)
    found = []
    for _ in range(15):
        center = means + normal_noise(rng, means, spread, 64, 1)[0]
        found.append(top_overlap(center, normal_noise(rng, means, spread, 64), top, 1.0))
    assert abs(np.mean(found) - true) < 0.5


def test_more_captions_are_needed_where_groups_are_nearer():
    rng = np.random.default_rng(15)
    far, near = np.exp(-0.3 * np.arange(40)), np.exp(-0.03 * np.arange(40))
    counts = [captions_for(m, normal_noise(rng, m, 1.0, 64), 10, 64) for m in (far, near)]
    assert counts[0] < counts[1]


def test_groups_that_are_all_alike_never_have_a_stable_top():
    rng = np.random.default_rng(16)
    means = np.ones(60)
    assert captions_for(means, normal_noise(rng, means, 1.0, 64), 10, 64) == np.inf


def test_a_top_of_all_groups_is_not_judged():
    found = intervals(*captions(np.random.default_rng(17), 16, np.full(10, 1e-3)))
    assert np.isnan(found.top_overlap)
    assert np.isnan(found.top_captions)


def test_intervals_come_back_from_the_manifest(make_result):
    result = with_intervals(make_result(nonfinite=["B01.o"]))
    result = replace(result, intervals=replace(result.intervals, top_captions=math.inf))
    again = from_manifest(json.loads(json.dumps(to_manifest(result), allow_nan=False))).intervals
    for name in ("low", "high", "rank_low", "rank_high", "top_overlap", "top_captions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result.intervals, name), name)
    assert again.tied == result.intervals.tied
    assert (again.level, again.captions, again.top) == (0.9, 16, 10)


def test_a_manifest_of_several_candidates_is_refused(make_result):
    data = to_manifest(make_result())
    with pytest.raises(UserError, match="2 candidates, a run has one"):
        from_manifest({**data, "candidates": data["candidates"] * 2})


def test_a_manifest_of_before_there_were_intervals_is_read(make_result):
    data = to_manifest(make_result())
    del data["intervals"]
    assert from_manifest(data).intervals is None


def test_rows_have_the_columns_where_intervals_are_known(make_result):
    result = with_intervals(make_result())
    row = result.rows()[0]
    assert row["low"] <= row["predicted_kl"] <= row["high"]
    assert row["rank_low"] <= row["rank"] <= row["rank_high"]
    assert not {"low", "high", "rank_low", "rank_high", "tied"} & set(make_result().rows()[0])


def test_an_engine_that_keeps_no_samples_has_no_intervals(make_result):
    assert with_intervals(make_result(samples=0)).intervals is None
