"""Fisher scores and measured damage on a GPU: the kernel, repetition, CPU against GPU, the noise floor of bf16."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from layerbits.scoring import onepass
from layerbits.scoring.reduction import token_scores
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search
from layerbits.trust.measure import measure_damage
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

PAIR = "wint4_afp16"


def subject(device, dtype):
    return support.loaded(support.tiny_model("llama", num_hidden_layers=4).to(device, dtype))


@pytest.fixture(scope="module")
def rows():
    return support.rows([support.random_segment(8, 96, seed=1)], [support.random_segment(8, 96, seed=2, first=77)])


def scored(device, dtype, folder, rows, method="gradient", **changes):
    wanted = support.configs(PAIR, device=device)
    return onepass.score(support.job(subject(device, dtype), folder, wanted, rows, method=method, **changes))


def damage(device, dtype, rows):
    model = subject(device, dtype)
    job = support.job(model, Path(), support.configs(PAIR, device=device), rows)
    search = Search.of(job)
    linears = ReplacedLinears(model.model, search.names, search.settings)
    linears.calibrate(rows.calib, search.need_logits)
    linears.load_ranges(linears.ranges())
    return measure_damage(model.model, linears, search, rows.score, disable_one=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_signed_reduction_equals_the_plain_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    gradient, output = (torch.randn(33, 500, generator=generator).to(dtype) for _ in range(2))
    quantized = torch.randn(33, 1500, generator=generator).to(dtype)
    fused = token_scores(gradient.cuda(), quantized.cuda(), output.cuda(), signed=True).cpu()
    plain = token_scores(gradient, quantized, output, signed=True)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_the_same_parameters_twice_give_nearly_the_same_scores(method, tmp_path, rows):
    one, again = (scored("cuda", torch.bfloat16, tmp_path / str(i), rows, method).raw for i in range(2))
    np.testing.assert_allclose(again, one, rtol=1e-3)


def test_cpu_and_gpu_rank_alike(tmp_path, rows):
    cpu, gpu = (scored(device, torch.float32, tmp_path / device, rows).predicted_kl[:, 0] for device in ("cpu", "cuda"))
    assert spearmanr(cpu, gpu).statistic > 0.99
    np.testing.assert_allclose(gpu, cpu, rtol=0.02)


def test_fisher_predicts_the_measured_damage(tmp_path, rows):
    predicted = scored("cuda", torch.float32, tmp_path, rows, "fisher", draws=16).predicted_kl[:, 0]
    ratio = damage("cuda", torch.float32, rows).alone.mean / predicted
    assert 0.85 < np.median(ratio) < 1.15


def test_the_noise_floor_of_bf16_is_above_that_of_float32(rows):
    narrow, wide = (damage("cuda", dtype, rows).floor for dtype in (torch.bfloat16, torch.float32))
    assert wide.max() < 1e-9 < narrow.max()
