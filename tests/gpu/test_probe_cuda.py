"""Probes on a GPU: the fused comparison, bf16 against its noise floor, FP4 by ModelOpt's kernels.

python -m pytest tests/gpu/test_probe_cuda.py
"""

import copy
from dataclasses import replace

import pytest
import torch

from layerbits.probing.apply import apply_scheme, find_ranges
from layerbits.probing.unquantized import UnquantizedLogits
from tests.integration.schemes_support import CALIBRATION, HELD_OUT, INFO, logits, probed, scheme_of
from tests.integration.scoring_support import candidate, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def on_gpu(dtype=torch.bfloat16):
    return tiny_model("llama").to("cuda", dtype)


@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint4_afp16", "wfp4_afp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_float64(pair, dtype):
    model = on_gpu(dtype)
    scheme = scheme_of(model, qkv=candidate(pair), down=candidate(pair))
    batches = [on_device(b) for b in HELD_OUT]
    ranges = find_ranges(model, [scheme], CALIBRATION)
    before = logits(model, batches)[:, :-1].double()
    unquantized = UnquantizedLogits(model, HELD_OUT)
    with apply_scheme(model, scheme, ranges):
        found, _ = unquantized.compare(model)
        after = logits(model, batches)[:, :-1].double()
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert found.logit_mse == pytest.approx(float((after - before).square().mean()), rel=1e-4)
    assert found.logit_max_error == pytest.approx(float((after - before).abs().max()), rel=1e-5)


def on_device(batch):
    return replace(batch, segments=tuple(replace(s, input_ids=s.input_ids.cuda()) for s in batch.segments))


def test_a_probe_in_bf16_stands_above_its_floor_and_leaves_the_model_alone():
    model = on_gpu()
    weights = copy.deepcopy(model.state_dict())
    eight, four = (scheme_of(model, n, qkv=candidate(n)) for n in ("wfp8_afp8", "wint4_afp16"))
    wide, narrow = (probed(model, [eight, four], replace(INFO, dtype="bfloat16"), dtype) for dtype in ("auto", "model"))
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    # In float32 the floor is that of rows alone against rows in a batch; where kernels compute both alike, it is 0.
    assert 0 <= wide.floor.kl < narrow.floor.kl
    for result in (wide, narrow):
        eight_kl, four_kl = (s.difference.kl for s in result.schemes)
        assert 10 * result.floor.kl < eight_kl < four_kl
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
