"""Experts on a GPU: quantized all at once as ModelOpt quantizes each, and one pass against stock in bf16."""

import numpy as np
import pytest
import torch

from layerbits.inputs.experts import named_experts
from layerbits.scoring import expert_weights, onepass, quantizers, stock
from layerbits.scoring.expert_weights import ExpertWeights, largest_by_row
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

MADE = [*support.distinct_candidates(cuda=True), support.candidate("wfp4_afp8", variant="nvfp4")]
SETTINGS = [
    s for s in quantizers.distinct_settings([support.search_config(c, "cuda") for c in MADE]).weights if s is not None
]
ORDER = 2e-3
"""What bf16 scores differ by at least, whatever the order in which experts are summed."""


@pytest.fixture(scope="module")
def mixture():
    model = support.tiny_model("qwen3_moe", hidden_size=512, num_hidden_layers=4)
    return support.loaded(model.bfloat16().cuda())


@pytest.fixture(scope="module")
def calibration():
    return support.rows([support.random_segment(4, 128, seed=1)], [support.random_segment(4, 128, seed=2, first=103)])


@pytest.mark.parametrize("attributes", SETTINGS, ids=lambda s: str(s.block_sizes or s.axis))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_experts_at_once_equal_modelopts_quantizer_for_each(attributes, dtype, monkeypatch):
    monkeypatch.setattr(expert_weights, "AT_ONCE", 2 * 40 * 256)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, 256, generator=generator) * torch.logspace(-3, 2, 5)[:, None, None]
    weight[3, 7] = 0
    weight = weight.to("cuda", dtype)
    together = ExpertWeights(attributes, weight)
    together.calibrate(weight, largest_by_row("experts", weight))
    each = []
    for expert in weight:
        quantizer = quantizers.make_quantizer(attributes, weight.device)
        quantizers.calibrate_weight(quantizer, expert)
        each.append(quantizer(expert))
    torch.testing.assert_close(together(weight), torch.stack(each), rtol=0, atol=0)


@pytest.fixture(scope="module")
def moved(mixture, calibration, tmp_path_factory):
    """How far stock's own scores move when its experts are summed in another order."""
    wanted = support.configs("wfp8_afp8", device="cuda")
    first = stock.score(support.job(mixture, tmp_path_factory.mktemp("first"), wanted, calibration))
    _reverse(mixture.model)
    try:
        second = stock.score(support.job(mixture, tmp_path_factory.mktemp("second"), wanted, calibration))
    finally:
        _reverse(mixture.model)
    largest = float(np.abs(second.raw / first.raw - 1).max())
    print("stock, experts reversed:", largest)
    return largest


@pytest.mark.parametrize("name", support.SIX)
def test_one_pass_is_as_near_to_stock_as_stock_to_itself(name, mixture, moved, calibration, tmp_path):
    wanted = support.configs(name, device="cuda")
    one = onepass.score(support.job(mixture, tmp_path / "one", wanted, calibration))
    reference = stock.score(support.job(mixture, tmp_path / "stock", wanted, calibration))
    largest = float(np.abs(one.raw / reference.raw - 1).max())
    print(name, "one pass against stock:", largest)
    assert largest < 2 * max(moved, ORDER)  # two draws of the same rounding


def test_lean_equals_fast(mixture, calibration, tmp_path):
    wanted = support.configs(*support.SIX, device="cuda")
    fast = onepass.score(support.job(mixture, tmp_path / "fast", wanted, calibration, memory="fast"))
    lean = onepass.score(support.job(mixture, tmp_path / "lean", wanted, calibration, memory="lean"))
    np.testing.assert_allclose(lean.raw, fast.raw, rtol=1e-3)
    assert lean.routing == fast.routing


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_two_gpus_scores_as_on_one(calibration, tmp_path):
    from accelerate import dispatch_model

    made = support.tiny_model("qwen3_moe", hidden_size=512, num_hidden_layers=4).bfloat16()
    wanted = support.configs(*support.SIX, device="cuda")
    whole = onepass.score(support.job(support.loaded(made.cuda()), tmp_path / "one", wanted, calibration))
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    where |= {f"model.layers.{i}": i // 2 for i in range(4)}
    spread = support.loaded(dispatch_model(made.cpu(), where))
    found = onepass.score(support.job(spread, tmp_path / "two", wanted, calibration))
    np.testing.assert_allclose(found.raw, whole.raw, rtol=1e-3)


def _reverse(model):
    """Numbers the experts the other way round: the same model, its experts summed in another order."""
    for name, experts in named_experts(model).items():
        gate = model.get_submodule(name.rpartition(".")[0]).gate
        tensors = [gate.weight, *(getattr(model.get_submodule(name), p) for p in experts.projections)]
        for tensor in tensors:
            tensor.data.copy_(tensor.data.flip(0))
