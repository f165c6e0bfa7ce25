import math

import numpy as np
import pytest

from layerbits.trust.agreement import Captions, agreement

GENERATOR = np.random.default_rng(0)
TOKENS = np.full(50, 10.0)


def captions(mean, noise=0.05):
    """Captions whose mean per token is about ``mean``."""
    return Captions(TOKENS[:, None] * mean * (1 + noise * GENERATOR.standard_normal((50, len(mean)))), TOKENS)


TRUTH = np.geomspace(1e-4, 1, 30)
EVERY = np.ones(30, dtype=bool)


def test_a_perfect_prediction_agrees_fully():
    found = agreement(TRUTH, captions(TRUTH, 0), EVERY, in_nats=True)
    assert (found.spearman.value, found.kendall.value, found.top.value) == (1, 1, 10)
    assert found.median_ratio.value == pytest.approx(1)
    assert found.within_2x.value == 1


def test_a_scaled_prediction_ranks_well_and_is_off_by_its_scale():
    found = agreement(TRUTH / 3, captions(TRUTH, 0), EVERY, in_nats=True)
    assert found.spearman.value == 1
    assert found.median_ratio.value == pytest.approx(3)
    assert found.within_2x.value == 0


def test_a_ranker_without_a_unit_has_no_ratio():
    found = agreement(TRUTH, captions(TRUTH), EVERY, in_nats=False)
    assert math.isnan(found.median_ratio.value)
    assert str(found.median_ratio) == "–"
    assert found.spearman.value > 0.9


def test_groups_that_do_not_count_are_left_out():
    wrong = TRUTH.copy()
    wrong[:5] = 1e6
    assert agreement(wrong, captions(TRUTH, 0), np.arange(30) >= 5, in_nats=True).spearman.value == 1


def test_a_prediction_that_is_not_finite_is_left_out():
    broken = TRUTH.copy()
    broken[3] = math.nan
    assert agreement(broken, captions(TRUTH, 0), EVERY, in_nats=True).groups == 29


def test_the_interval_is_around_the_value_and_ends_at_the_best():
    noisy = captions(TRUTH, 2.0)
    found = agreement(TRUTH, noisy, EVERY, in_nats=True, predicted_samples=noisy).spearman
    assert found.low < found.value <= found.high <= 1


def test_noisier_captions_widen_the_interval():
    widths = []
    for noise in (0.1, 3.0):
        found = agreement(TRUTH, captions(TRUTH, noise), EVERY, in_nats=True).spearman
        widths.append(found.high - found.low)
    assert widths[0] < widths[1]


def test_two_groups_are_too_few_to_rank():
    assert math.isnan(agreement(TRUTH, captions(TRUTH), np.arange(30) < 2, in_nats=True).spearman.value)
