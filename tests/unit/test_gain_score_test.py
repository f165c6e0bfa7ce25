"""The score of each linear's gain: a derivative, and what finds a wrong scale that the KL divergence does not show."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerbits.inputs.calibration import Batch, Segment
from layerbits.serving.distributions import Events
from layerbits.serving.gain_score_test import gain_scores
from layerbits.serving.reference import Whole, logprobs, replicas, rounding
from layerbits.serving.verdict import largest_gain

VOCABULARY, ROWS, LENGTH, CAPTIONS = 24, 6, 17, 48


def model_of(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    loss = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    loss[:, 0] = False
    sample = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * CAPTIONS // (ROWS * LENGTH)
    return (Batch((Segment(ids, None, loss, sample.to(torch.int32)),)),)


@pytest.fixture(scope="module")
def everything():
    positions = ROWS * (LENGTH - 1)
    place, token = np.divmod(np.arange(positions * VOCABULARY), VOCABULARY)
    return Events(positions, place * (1 << 32) + token)


def louder(model, name, factor):
    """Multiplies a linear's weight, in place."""
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(factor)
    return model


def test_a_score_is_the_derivative_by_the_logarithm_of_a_gain(batches, everything):
    deviation = np.random.default_rng(0).normal(0, 1e-2, len(everything.events))
    found = gain_scores(model_of().double(), batches, everything, deviation)
    assert found.scores.shape == (14, CAPTIONS)
    step = 1e-2
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        plus, minus = (
            (logprobs(louder(model_of().double(), name, f), batches).at(everything) * deviation).sum()
            for f in (1 + step, 1 - step)
        )
        assert found.scores[found.linears.index(name)].sum() == pytest.approx((plus - minus) / (2 * step), rel=2e-2)


def largest(found):
    return largest_gain(found.linears, found.scores, found.information)


def told_of(model, batches, everything):
    with rounding(model, "bfloat16"):
        return np.exp(logprobs(model, batches).at(everything))


@pytest.mark.parametrize(
    ("name", "factor"), [("model.layers.1.mlp.down_proj", 1.1), ("model.layers.0.mlp.up_proj", 0.9)]
)
def test_a_wrong_scale_is_told_from_rounding_and_its_linear_is_named(batches, everything, name, factor):
    model = model_of()
    _, expected = replicas(model, batches, "bfloat16")
    told = told_of(louder(model_of(), name, factor), batches, everything)
    gain = largest(gain_scores(model, batches, everything, told - np.exp(expected.at(everything))))
    assert gain.wrong
    assert gain.linear.rsplit(".", 1)[0] == name.rsplit(".", 1)[0]  # those of one MLP have nearly the same direction
    assert 0.3 < gain.off / (factor - 1) < 2
    assert (gain.captions, gain.linears) == (CAPTIONS, 14)


def test_rounding_alone_is_no_wrong_scale(batches, everything):
    model = model_of()
    _, expected = replicas(model, batches, "bfloat16")
    exact = np.exp(logprobs(model, batches).at(everything))
    gain = largest(gain_scores(model, batches, everything, exact - np.exp(expected.at(everything))))
    assert gain.off != 0
    assert not gain.wrong


def test_computations_that_round_elsewhere_are_expected_in_their_mean(batches):
    first, expected = replicas(model_of(), batches, "bfloat16")
    assert isinstance(expected, Whole)
    assert torch.allclose(expected.logprobs.exp().sum(-1), torch.ones(len(expected.logprobs)), atol=1e-5)
    assert 0 < (expected.logprobs - first.logprobs).abs().max() < 0.3
    again, _ = replicas(model_of(), batches, "bfloat16")
    assert torch.equal(first.logprobs, again.logprobs)


def test_padding_belongs_to_no_caption(everything):
    torch.manual_seed(1)
    ids, mask = torch.randint(0, VOCABULARY, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    loss, sample = mask.bool(), torch.where(mask.bool(), torch.tensor([[0], [1]]), -1).to(torch.int32)
    loss[:, 0] = False
    batches = (Batch((Segment(ids, mask, loss, sample),)),)
    place, token = np.divmod(np.arange(6 * VOCABULARY), VOCABULARY)
    events = Events(6, place * (1 << 32) + token)
    assert gain_scores(model_of(), batches, events, np.full(len(events.events), 1e-3)).scores.shape == (14, 2)
