"""The ``fisher`` method on a small model: what it predicts, and that it can be repeated."""

import numpy as np
import pytest

from layerbits.scoring import kl, onepass

from .scoring_support import configs, job, loaded, tiny_model

PAIR = "wint8_aint8"


@pytest.fixture(scope="module")
def llama():
    return loaded(tiny_model("llama"))


@pytest.fixture(scope="module")
def wanted():
    return configs(PAIR)


def test_with_many_draws_it_predicts_the_measured_divergence(llama, wanted, tmp_path):
    fisher = onepass.score(job(llama, tmp_path / "fisher", wanted, method="fisher", draws=100))
    measured = kl.score(job(llama, tmp_path / "kl", wanted, method="kl_div"))
    ratio = fisher.predicted_kl / measured.predicted_kl
    assert 0.85 < np.median(ratio) < 1.15
    assert np.all((ratio > 0.6) & (ratio < 1.6))


def test_the_shares_of_the_samples_sum_to_the_predicted_kl(llama, wanted, tmp_path):
    scores = onepass.score(job(llama, tmp_path, wanted, method="fisher", draws=2))
    np.testing.assert_allclose(scores.sample_kl.sum(axis=0), scores.predicted_kl, rtol=1e-6)


def test_the_same_seed_gives_the_same_scores(llama, wanted, tmp_path):
    one, again, other = (
        onepass.score(job(llama, tmp_path / str(i), wanted, method="fisher", draws=1, seed=seed)).raw
        for i, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_lean_scores_as_fast(llama, wanted, tmp_path):
    fast, lean = (
        onepass.score(job(llama, tmp_path / memory, wanted, method="fisher", draws=2, memory=memory)).raw
        for memory in ("fast", "lean")
    )
    np.testing.assert_allclose(lean, fast, rtol=1e-4)
