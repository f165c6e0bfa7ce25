"""The weight quantizers of all experts at once, against ModelOpt's own quantizer for each expert."""

import pytest
import torch

from layerbits.errors import UserError
from layerbits.scoring import expert_weights, quantizers
from layerbits.scoring.expert_weights import ExpertWeights, largest_by_row
from tests.integration import scoring_support as support

MADE = [*support.distinct_candidates(), support.candidate("wfp4_afp8", variant="nvfp4")]
SETTINGS = [s for s in quantizers.distinct_settings([support.search_config(c) for c in MADE]).weights if s is not None]


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(5, 24, 256, generator=generator) * torch.logspace(-3, 2, 5)[:, None, None]
    made[3, 7] = 0  # a row without a range
    return made


def each(attributes, weight):
    """One quantizer an expert, calibrated and called one after the other, as ModelOpt does."""
    made = []
    for expert in weight:
        quantizer = quantizers.make_quantizer(attributes, weight.device)
        quantizers.calibrate_weight(quantizer, expert)
        made.append(quantizer(expert))
    return torch.stack(made)


@pytest.mark.parametrize("attributes", SETTINGS, ids=lambda s: str(s.block_sizes or s.axis))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_once", [1 << 27, 2 * 24 * 256])
def test_all_experts_at_once_equal_modelopts_quantizer_for_each(attributes, dtype, at_once, weight, monkeypatch):
    monkeypatch.setattr(expert_weights, "AT_ONCE", at_once)
    weight = weight.to(dtype)
    together = ExpertWeights(attributes, weight)
    together.calibrate(weight, largest_by_row("experts", weight))
    assert torch.equal(together(weight), each(attributes, weight))


def test_a_weight_that_is_not_finite_is_refused_by_name(weight):
    broken = weight.clone()
    broken[2, 3, 4] = torch.inf
    with pytest.raises(UserError, match=r"layers\.0\.experts is not finite"):
        largest_by_row("layers.0.experts", broken)
