"""Weights in host memory on a GPU: same scores, and never the whole model on the card."""

import numpy as np
import pytest
import torch

from layerbits.inputs.offload import offload
from layerbits.scoring import kl, onepass
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}


@pytest.fixture(scope="module")
def calibration():
    return support.rows([support.random_segment(4, 128, seed=1)], [support.random_segment(4, 128, seed=2, first=103)])


def wide_model(dtype, device):
    return support.loaded(support.tiny_model("llama", **_WIDE).to(dtype).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_scores_are_those_of_lean(method, dtype, calibration, tmp_path):
    wanted = support.configs(*support.SIX[2:], device="cuda")
    engine = kl if method == "kl_div" else onepass
    found = []
    for memory in ("lean", "offload"):
        subject = wide_model(dtype, "cuda" if memory == "lean" else "cpu")
        if memory == "offload":
            offload(subject.model, "cuda")
        made = support.job(subject, tmp_path / memory, wanted, calibration, method=method, draws=2, memory=memory)
        found.append(engine.score(made))
    within = 1e-6 if dtype == torch.float32 else 1e-4
    # its sums cancel: a last bit of the weights moves them twenty times as far as the gradient's squares
    within *= 20 if method == "fisher" else 1
    np.testing.assert_allclose(found[1].raw, found[0].raw, rtol=within)


def test_the_card_never_holds_the_model(calibration, tmp_path):
    torch.cuda.empty_cache()
    subject = wide_model(torch.float32, "cpu")
    own = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    streaming = offload(subject.model, "cuda")
    assert streaming.pinned
    wanted = support.configs("wint8_afp16", device="cuda")
    scores = onepass.score(support.job(subject, tmp_path, wanted, calibration, memory="offload"))
    assert scores.mode == "offload"
    assert torch.cuda.max_memory_allocated() - before < own / 2
