"""One pass against stock on a GPU, in bf16."""

import numpy as np
import pytest
import torch

from layerbits.scoring import onepass, stock, taps
from layerbits.scoring.reduction import CLAMP, token_scores
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def qwen():
    return support.loaded(support.tiny_model("qwen3_vl", hidden_size=512, num_hidden_layers=4).bfloat16().cuda())


@pytest.fixture(scope="module")
def calibration():
    return support.rows([support.random_segment(4, 128, seed=1)], [support.random_segment(4, 128, seed=2, first=103)])


@pytest.mark.parametrize("name", support.SIX)
def test_one_pass_scores_equal_stock_scores(name, qwen, calibration, tmp_path):
    wanted = support.configs(name, device="cuda")
    one = onepass.score(support.job(qwen, tmp_path / "one", wanted, calibration))
    reference = stock.score(support.job(qwen, tmp_path / "stock", wanted, calibration))
    np.testing.assert_allclose(one.raw, reference.raw, rtol=1e-4)


def test_lean_equals_fast(qwen, calibration, tmp_path):
    wanted = support.configs(*support.SIX, device="cuda")
    fast = onepass.score(support.job(qwen, tmp_path / "fast", wanted, calibration, memory="fast"))
    lean = onepass.score(support.job(qwen, tmp_path / "lean", wanted, calibration, memory="lean"))
    np.testing.assert_allclose(lean.raw, fast.raw, rtol=1e-4)


def test_out_of_memory_in_fast_goes_on_in_lean(qwen, calibration, tmp_path, monkeypatch):
    score = taps.Taps.score

    def full(self, *arguments):
        if self.keep_weights:
            raise torch.OutOfMemoryError("planted")
        return score(self, *arguments)

    wanted = support.configs("wfp8_afp8", device="cuda")
    whole = onepass.score(support.job(qwen, tmp_path / "whole", wanted, calibration, memory="fast"))
    monkeypatch.setattr(taps.Taps, "score", full)
    fallen = onepass.score(support.job(qwen, tmp_path / "fallen", wanted, calibration, memory="fast"))
    assert fallen.mode == "lean"
    assert any("ran out of memory" in line for line in fallen.notes)
    np.testing.assert_allclose(fallen.raw, whole.raw, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "features", "many"), [(7, 96, 1), (33, 5000, 3), (128, 1024, 4)])
def test_the_fused_reduction_equals_the_plain_formula(tokens, features, many, dtype):
    generator = torch.Generator().manual_seed(0)
    gradient, output = (torch.randn(tokens, features, generator=generator).to(dtype) for _ in range(2))
    quantized = torch.randn(tokens, many * features, generator=generator).to(dtype)
    gradient[0, 0], quantized[1, 0], quantized[2, 0] = 1e30, torch.nan, torch.inf
    gradient[2, 0] = 1.0
    fused = token_scores(gradient.cuda(), quantized.cuda(), output.cuda()).cpu()
    plain = token_scores(gradient, quantized, output)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0, equal_nan=True)
    assert fused[0, 0] >= CLAMP**2 * 0.9
    assert torch.isnan(fused[0, 1])
