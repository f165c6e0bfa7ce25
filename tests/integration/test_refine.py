"""Groups measured after the pass: which ones, what they become, and what it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerbits.errors import UserError
from layerbits.results.bootstrap import standard_error
from layerbits.scoring import kl, onepass
from layerbits.scoring.refine import SHARE, Candidate, _scales, check, deciding, refine

from . import scoring_support as support

ROWS = support.rows([support.random_segment(4, 24, seed=1)], [support.random_segment(4, 24, seed=2, first=20)])
PAIRS = ("wint4_afp16", "wint8_afp16")


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """A scored job of two candidates, and every group of it measured."""
    folder = tmp_path_factory.mktemp("refine")
    model = support.loaded(support.tiny_model("llama", num_hidden_layers=3))
    job = support.job(model, folder / "pass", support.configs(*PAIRS), ROWS, method="gradient")
    measured = kl.score(replace(job, method="kl_div", workdir=folder / "measured"))
    return job, onepass.score(job), measured


def test_the_most_sensitive_are_measured_and_the_others_scaled(passes):
    job, scores, measured = passes
    found = refine(job, scores, 4)
    for c in range(2):
        top = np.argsort(-scores.predicted_kl[:, c])[:4]
        rest = np.setdiff1d(np.arange(len(scores.groups)), top)
        assert np.isfinite(found.measured_se[top, c]).all()
        assert np.isnan(found.measured_se[rest, c]).all()
        np.testing.assert_allclose(found.predicted_kl[top, c], measured.predicted_kl[top, c], rtol=1e-4)
        factor, scales = _scales(
            measured.predicted_kl[top, c],
            scores.predicted_kl[top, c],
            top.tolist(),
            [g.kind for g in scores.groups],
        )
        np.testing.assert_allclose(found.predicted_kl[rest, c], (scores.predicted_kl[:, c] * scales)[rest], rtol=1e-3)
        assert found.factors[PAIRS[c]] == pytest.approx(factor, rel=1e-4)
        order = np.argsort(found.raw[:, c]), np.argsort(found.predicted_kl[:, c])
        np.testing.assert_array_equal(*order)
        assert np.median(found.raw[rest, c] / scores.raw[rest, c]) == pytest.approx(1, rel=0.5)  # ModelOpt's scale


def test_predictions_are_scaled_by_kind_as_far_as_it_is_known():
    kinds = ["qkv", "qkv", "qkv", "o", "o", "down"]
    factor, scales = _scales(np.array([4.0, 4.0, 1.0]), np.ones(3), [0, 1, 3], kinds)
    assert factor == 4
    np.testing.assert_allclose(scales[:3], 4)
    assert 1 < scales[3] == scales[4] < 4  # one group says less than all together
    assert scales[5] == pytest.approx(4)  # of this kind nothing is known
    assert _scales(np.ones(2) * 5, np.ones(2), [0, 1], kinds) == (1.0, pytest.approx(np.ones(6)))


def test_captions_add_up_to_the_measured_kl_and_its_error(passes):
    job, scores, _ = passes
    found = refine(job, scores, 3)
    np.testing.assert_allclose(found.sample_kl.sum(axis=0), found.predicted_kl, rtol=1e-4)
    g = int(np.argmax(scores.predicted_kl[:, 0]))
    sums = found.sample_kl[:, g, 0] * found.sample_tokens.sum()
    used = found.sample_tokens > 0
    assert found.measured_se[g, 0] == pytest.approx(standard_error(sums[used], found.sample_tokens[used])[1], rel=1e-6)


def test_a_killed_measurement_goes_on_where_it_was(passes, monkeypatch):
    job, scores, _ = passes
    first = refine(job, scores, 5)

    def never(*_args, **_kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("layerbits.scoring.suffix.SuffixRunner.measure", never)
    monkeypatch.setattr("layerbits.scoring.refine.find_blocks", lambda *_args: None)
    again = refine(job, scores, 5)
    np.testing.assert_array_equal(again.predicted_kl, first.predicted_kl)


def test_a_bf16_model_is_measured_in_float32(tmp_path):
    model = support.loaded(support.tiny_model("llama").bfloat16())
    job = support.job(model, tmp_path, support.configs("wint8_afp16"), ROWS)
    found = refine(job, onepass.score(job), 3)
    assert "float32" in found.notes[-1]
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


def test_more_than_there_are_is_refused(passes):
    job, scores, _ = passes
    with pytest.raises(UserError, match=r"autoquant.refine=13 is more than the 12 groups"):
        refine(job, scores, 13)
    check("auto", 3)


def made(predicted, quantized=None, spread=1.05, blocks=None):
    predicted = np.asarray(predicted, dtype=float)
    count = len(predicted)
    return Candidate(
        predicted,
        predicted / spread,
        predicted * spread,
        np.ones(count, bool) if quantized is None else np.asarray(quantized),
        np.ones(count),
        np.arange(count) // 4 if blocks is None else np.asarray(blocks),
    )


def test_auto_measures_the_first_block_and_the_line_of_the_top_and_pays_a_quarter_at_most():
    rng = np.random.default_rng(0)
    of = made(np.exp(rng.normal(0, 2, 120)))
    chosen = deciding(of)
    price = 30 - of.blocks
    assert price[chosen].sum() <= SHARE * price.sum()
    order = np.argsort(-of.predicted)
    assert {0, 1, 2, 3, int(order[9]), int(order[10])} <= set(chosen)
    assert len(set(chosen)) == len(chosen)


def test_auto_measures_the_groups_at_the_solvers_margin():
    predicted = np.concatenate([np.full(11, 1e3), np.geomspace(1e-3, 1, 109)])
    quantized = predicted < 0.1
    of = made(predicted, quantized, spread=1.2, blocks=np.full(120, 29))
    chosen = deciding(of)
    edge = int(np.flatnonzero(quantized)[-1])
    assert {edge, edge + 1} <= set(chosen)


def test_a_group_without_a_score_is_not_measured():
    of = made([np.nan, 3.0, 2.0, 1.0])
    assert 0 not in deciding(of)
