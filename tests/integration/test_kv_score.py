"""What quantizing keys and values costs, in the pass that scores the candidates."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerbits.candidates.kv_cache import KV_FORMATS
from layerbits.scoring import onepass
from layerbits.scoring.kv_cache import KvCache
from layerbits.scoring.steps import loss_backward, loss_logits

from .scoring_support import configs, job, loaded, tiny_model, usual_rows

FORMATS = ("fp8", "nvfp4")


@pytest.fixture(scope="module", params=["fast", "lean"])
def scored(request, tmp_path_factory):
    subject = loaded(tiny_model("llama"))
    plain = job(subject, tmp_path_factory.mktemp("kv"), configs("wfp8_afp8"), memory=request.param)
    return subject, onepass.score(replace(plain, kv_formats=FORMATS)), plain


def test_every_attention_has_a_score_in_every_format(scored):
    found = scored[1].kv_cache
    assert [(s.format, s.block) for s in found] == [("fp8", 0), ("fp8", 1), ("nvfp4", 0), ("nvfp4", 1)]
    assert all(s.score > 0 for s in found)
    by_format = {f: sum(s.predicted_kl for s in found if s.format == f) for f in FORMATS}
    assert by_format["nvfp4"] > 5 * by_format["fp8"]


def test_scores_of_linears_are_those_without(scored, tmp_path):
    np.testing.assert_array_equal(onepass.score(replace(scored[2], workdir=tmp_path)).raw, scored[1].raw)


def test_a_score_is_the_squared_gradient_weighted_error_of_the_attentions_output(scored):
    subject, found, _ = scored
    model = subject.model
    cache = KvCache(model, KV_FORMATS["fp8"])
    cache.calibrate(usual_rows().calib)
    total = 0.0
    for batch in usual_rows().score:
        with entering(model, keep_gradients=True) as outputs:
            loss_backward(model, batch)
        with torch.no_grad(), cache.active(), entering(model) as changed:
            loss_logits(model, batch)
        pairs = zip(outputs, changed, strict=True)
        total += sum(float((y.grad * (c - y.detach())).double().square().sum()) for y, c in pairs)
    assert found.kv_cache[0].score == pytest.approx(total, rel=1e-4)


@contextmanager
def entering(model, keep_gradients=False):
    """What the first block's attention hands to its output projection."""
    seen = []

    def see(_module, args):
        if keep_gradients:
            args[0].retain_grad()
        seen.append(args[0])

    handles = [
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(see),
        model.get_input_embeddings().register_forward_hook(
            lambda _m, _a, y: y.requires_grad_() if keep_gradients else y
        ),
    ]
    yield seen
    for handle in handles:
        handle.remove()
