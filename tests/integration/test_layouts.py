"""Modules whose weights do not lie as a linear's: GPT-2's transposed ones, and convolutions over the tokens."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerbits.errors import Unsupported
from layerbits.inputs.linears import is_convolution, is_transposed
from layerbits.inputs.models import output_head
from layerbits.probing.apply import apply_scheme
from layerbits.results.assignment import Assignment
from layerbits.schemes import Scheme
from layerbits.scoring import kl, onepass, stock
from layerbits.scoring.groups import named_groups
from layerbits.scoring.state import decisions
from layerbits.scoring.steps import calibration_forward
from tests.families import build

from .schemes_support import CALIBRATION, DATA, INFO, logits
from .scoring_support import candidate, configs, job, loaded, search_config


@pytest.fixture(scope="module", params=["gpt2", "jamba"])
def subject(request):
    found = loaded(build(request.param))
    odd = is_transposed if request.param == "gpt2" else is_convolution
    return found, [n for n in found.linears if odd(found.model.get_submodule(n))]


def whole_scheme(found, made):
    """Everything but head and experts quantized by one candidate."""
    head = output_head(found.model)
    named = named_groups(found.model, [(d.modules, d.weights) for d in decisions(found.model, [])], head)
    groups = tuple(g for g in named if g.kind not in ("lm_head", "experts"))
    chosen = Assignment(made.info.name for _ in groups)
    return Scheme("all", ("r",), INFO, DATA, groups, (made.info,), chosen, 8.0, None, 0.0, 0.0, {"method": "budget"})


@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint4_aint8"])
def test_a_scheme_computes_what_modelopt_computes_with_its_config(pair, subject):
    import modelopt.torch.quantization as mtq

    found, odd = subject
    made = candidate(pair)
    scheme = whole_scheme(found, made)
    assert {*odd} <= {*scheme.modules}
    changed = mtq.quantize(
        copy.deepcopy(found.model),
        search_config(made),
        lambda m: [calibration_forward(m, batch, need_logits=False) for batch in CALIBRATION],
    )
    mtq.disable_quantizer(changed, lambda name: name.rsplit(".", 1)[0] not in scheme.modules)
    before = logits(found.model)
    with apply_scheme(found.model, scheme, CALIBRATION):
        ours = logits(found.model)
    torch.testing.assert_close(ours, logits(changed), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before, rtol=1e-3)
    assert torch.equal(logits(found.model), before)


def test_stock_leaves_the_model_as_it_was(subject, tmp_path):
    found, odd = subject
    before = logits(found.model)
    kept = {n: (type(found.model.get_submodule(n)), found.model.get_submodule(n).weight.clone()) for n in odd}
    stock.score(job(found, tmp_path, configs("wfp8_afp8")))
    assert torch.equal(logits(found.model), before)
    assert all(type(found.model.get_submodule(n)) is kind for n, (kind, _) in kept.items())
    assert all(torch.equal(found.model.get_submodule(n).weight, weight) for n, (_, weight) in kept.items())
    assert not any(hasattr(found.model.get_submodule(n), "in_features") for n in odd if kept[n][0].__name__ == "Conv1D")


def test_lean_equals_fast_and_samples_sum_to_the_whole(subject, tmp_path):
    found, _ = subject
    fast, lean = (
        onepass.score(job(found, tmp_path / mode, configs("wfp8_afp8", "wint4_afp16"), memory=mode))
        for mode in ("fast", "lean")
    )
    np.testing.assert_array_equal(fast.raw, lean.raw)
    np.testing.assert_allclose(fast.sample_kl.sum(axis=0), fast.predicted_kl, rtol=1e-9)


def test_kl_div_is_what_stock_measures(subject, tmp_path):
    found, odd = subject
    wanted = configs("wint4_afp16")  # damage that stock's difference of float32 logarithms can tell from rounding
    ours = kl.score(job(found, tmp_path / "ours", wanted, scored=tuple(odd), method="kl_div"))
    reference = stock.score(job(found, tmp_path / "stock", wanted, scored=tuple(odd), method="kl_div"))
    assert ours.groups == reference.groups
    np.testing.assert_allclose(ours.raw, reference.raw, rtol=2e-3)


def test_a_static_scale_per_position_is_refused_for_a_convolution(tmp_path):
    found = loaded(build("jamba"))
    (name,) = [n for n in found.linears if is_convolution(found.model.get_submodule(n))]
    wanted = configs("wint8_aint8", overlay="a_per_hidden_channel")
    with pytest.raises(Unsupported, match="conv1d is a convolution"):
        onepass.score(replace(job(found, tmp_path, wanted), scored=(name,)))
