"""The kl_div engine on a GPU: its kernel, its fused norms, and its scores against a CPU's and ModelOpt's own.

python -m pytest tests/gpu/test_kl_div_cuda.py
"""

import numpy as np
import pytest
import torch

from layerbits.scoring import kl, stock
from layerbits.scoring.divergence import divergence, log_partition
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.suffix import SuffixRunner, find_blocks
from tests.integration.scoring_support import configs, job, loaded, tiny_model, usual_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

STOCK_NOISE = 5e-7  # nats per token: what float32 log-probabilities of about 10 cost ModelOpt when they are subtracted


def subject(kind="llama", device="cuda", dtype=torch.float32):
    return loaded(tiny_model(kind, num_hidden_layers=4).to(device, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (0.1, 0.0), (1.0, 30.0), (1.0, -30.0), (300.0, 0.0)])
def test_kernel_equals_the_definition_in_float64(dtype, scale, shift):
    generator = torch.Generator("cuda").manual_seed(0)
    p = (4 * torch.randn(6, 9001, generator=generator, device="cuda")).to(dtype)
    q = (p.float() + shift + scale * torch.randn(2, 6, 9001, generator=generator, device="cuda")).to(dtype)
    measured, change = divergence(p, log_partition(p), q, torch.arange(6, device="cuda"))
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(measured.double(), wanted, rtol=1e-4, atol=1e-5 if shift else 1e-9)
    torch.testing.assert_close(change.double(), (log_p[None] - log_q)[:, range(6), range(6)], rtol=1e-5, atol=1e-4)


def test_kernel_keeps_what_is_not_finite():
    p = torch.randn(4, 5000, device="cuda")
    q = p[None].clone()
    q[0, 2, 7] = torch.nan
    measured, _ = divergence(p, log_partition(p), q, torch.arange(4, device="cuda"))
    assert torch.isfinite(measured[0]).tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_vl", "qwen2_5_vl"])
def test_fused_norms_predict_what_the_original_ones_predict(kind, dtype):
    model = subject(kind, dtype=dtype).model
    ids = usual_rows().score[0].segments[0].input_ids.cuda()
    with torch.no_grad():
        original = model(input_ids=ids).logits.float()
        with fused_norms(model):
            assert any("forward" in vars(m) for m in model.modules())
            fused = model(input_ids=ids).logits.float()
    assert not any("forward" in vars(m) for m in model.modules())
    assert (fused - original).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * original.norm()


def test_perturbation_that_changes_nothing_measures_nothing():
    model = subject(dtype=torch.bfloat16).model
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    batch = usual_rows().score[0]
    runner = SuffixRunner(model, find_blocks(model, names, batch), batch, tokens_at_once=1)
    measured, change = runner.measure([{n: model.get_submodule(n).forward} for n in names])
    assert measured.abs().max() < 1e-6
    assert change.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen3_vl"])
def test_scores_equal_stock_and_the_cpu(kind, tmp_path):
    wanted, data = configs("wint8_aint8"), usual_rows()
    on_gpu = kl.score(job(subject(kind), tmp_path / "gpu", wanted, data, method="kl_div"))
    on_cpu = kl.score(job(subject(kind, "cpu"), tmp_path / "cpu", wanted, data, method="kl_div"))
    reference = stock.score(job(subject(kind), tmp_path / "stock", wanted, data, method="kl_div"))
    noise = STOCK_NOISE * sum(data.batch_loss_tokens)
    # a sum in another order may round an activation to the next integer
    np.testing.assert_allclose(on_gpu.raw, on_cpu.raw, rtol=2e-2, atol=noise)
    np.testing.assert_allclose(on_gpu.raw, reference.raw, rtol=2e-2, atol=noise)
