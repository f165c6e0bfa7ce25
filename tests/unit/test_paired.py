"""Paired statistics against numbers worked out elsewhere."""

import math

import numpy as np
import pytest
from scipy import stats

from layerbits.answers.paired import Interval, Paired, detectable, fewest, holm, judge, mean_interval, power


def counts(lost, won, n=256):
    return Paired(n // 2, lost, won, n - n // 2 - lost - won)


def test_answers_are_counted_by_what_became_of_them():
    before = [True, True, True, False, False, True]
    after = [True, False, False, True, False, True]
    assert Paired.of(before, after) == Paired(both=2, lost=2, won=1, neither=1)


@pytest.mark.parametrize(("before", "after"), [([True], [True, False]), ([], [])])
def test_answers_that_are_no_pairs_are_refused(before, after):
    with pytest.raises(ValueError, match="no pairs"):
        Paired.of(before, after)


def test_mcnemar_is_the_sum_of_both_tails_of_a_fair_coin():
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert counts(12, 3).p_value == pytest.approx(2 * tail)
    assert counts(3, 12).p_value == pytest.approx(2 * tail)
    assert counts(0, 0).p_value == 1


def test_the_interval_is_bonett_and_prices():
    # Bonett and Price 2012: (f12 + 1) / (n + 2) and (f21 + 1) / (n + 2) in the Wald interval.
    found = Paired(200, 12, 3, 41).difference
    a, b = 13 / 258, 4 / 258
    half = stats.norm.ppf(0.975) * math.sqrt((a + b - (a - b) ** 2) / 258)
    assert found.value == pytest.approx(-9 / 256)
    assert (found.low, found.high) == pytest.approx((b - a - half, b - a + half))


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    draws = np.random.default_rng(0).multinomial(150, [0.06, 0.02, 0.92], size=3000)
    ends = [Paired(0, int(a), int(b), int(c)).difference for a, b, c in draws]
    assert 0.94 < np.mean([e.low <= -0.04 <= e.high for e in ends]) < 0.975


def test_a_paired_interval_is_narrower_than_an_unpaired_one():
    paired = counts(5, 4)
    assert paired.difference.high - paired.difference.low < paired.unpaired_width / 2


def test_power_is_how_often_the_test_finds_the_difference():
    draws = np.random.default_rng(1).multinomial(256, [0.05, 0.01, 0.94], size=4000)
    found = np.mean([Paired(0, int(a), int(b), int(c)).p_value <= 0.05 for a, b, c in draws])
    assert power(256, 0.05, 0.01) == pytest.approx(found, abs=0.02)


def test_the_detectable_difference_has_the_power_that_it_is_named_for():
    for n, noise in ((100, 0.0), (256, 0.02), (1000, 0.05)):
        least = detectable(n, noise)
        assert power(n, noise / 2 + least, noise / 2) == pytest.approx(0.8, abs=0.01)
    assert detectable(1000) < detectable(256) < detectable(256, 0.05)
    assert math.isnan(detectable(5))


def test_fewest_is_the_least_that_could_show_anything():
    assert fewest(0.05) == 6
    for level in (0.05, 0.05 / 12, 0.05 / 36):
        n = fewest(level)
        assert counts(n, 0).p_value <= level < counts(n - 1, 0).p_value


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)


def test_a_mean_has_its_t_interval():
    values = [0.1, -0.4, 0.3, -0.2, -0.6]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == Interval(pytest.approx(np.mean(values)), pytest.approx(low), pytest.approx(high))
    assert math.isnan(mean_interval([1.0]).low)


def verdict(lost, won, margin=None, others=0, n=256):
    pairs = {("task", "scheme"): counts(lost, won, n)} | {("task", str(i)): counts(0, 0, n) for i in range(others)}
    return judge(pairs, {}, margin)["task", "scheme"]


def test_verdicts_in_words():
    assert verdict(20, 2).words == "worse by 3.4–11 points"
    assert verdict(2, 20).words == "better by 3.4–11 points"
    assert verdict(4, 3).words.startswith("no difference seen (would see ≥ ")
    assert "too few questions" in verdict(1, 1, n=5).words


def test_a_difference_that_one_of_many_comparisons_would_show_is_not_seen():
    assert verdict(9, 1).kind == "worse"
    assert verdict(9, 1, others=11).kind == "no difference seen"
    assert verdict(9, 1, others=11).detectable > verdict(9, 1).detectable


def test_a_margin_is_kept_where_the_interval_ends_above_it():
    assert verdict(1, 1, margin=0.03).within_margin is True
    assert verdict(1, 1, margin=0.01).within_margin is False
    assert verdict(1, 1).within_margin is None
    assert "not worse than margin of 3 points" in verdict(1, 1, margin=0.03).words
    assert "not shown to be within margin of 1 points" in verdict(1, 1, margin=0.01).words
