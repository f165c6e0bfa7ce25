"""A bf16 model measured in float32: the same however it is widened, quantized as in bf16, and as it was afterwards."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerbits.errors import UserError
from layerbits.inputs.offload import offload
from layerbits.inputs.residence import own_dtype
from layerbits.probing.apply import apply_scheme, find_ranges
from layerbits.scoring import precision
from layerbits.scoring.precision import Precision, computing, plan_precision
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search
from layerbits.trust.measure import measure_damage

from . import scoring_support as support
from .schemes_support import CALIBRATION, INFO, probed, scheme_of
from .scoring_support import candidate, tiny_model

WHOLE = Precision("float32", True, False, 1.0, 2.0)
BY_BLOCK = replace(WHOLE, by_block=True)
ROWS = support.rows([support.random_segment(4, 24, seed=1)], [support.random_segment(4, 24, seed=2, first=9)])


def narrow_model(kind="llama"):
    return tiny_model(kind).bfloat16()


def damage(model, pair, how):
    job = support.job(support.loaded(model), Path(), support.configs(pair), ROWS)
    search = Search.of(job)
    linears = ReplacedLinears(model, search.names, search.settings)
    linears.calibrate(ROWS.calib, search.need_logits)
    linears.load_ranges(linears.ranges())
    linears.fix_dtypes()
    with computing(model, how):
        return measure_damage(model, linears, search, ROWS.score, disable_one=False)


def streamed(kind="llama"):
    model = narrow_model(kind)
    offload(model, torch.device("cpu"))
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint4_afp16"])
def test_whole_block_by_block_and_streamed_measure_the_same(pair, kind):
    models = (narrow_model(kind), WHOLE), (narrow_model(kind), BY_BLOCK), (streamed(kind), WHOLE)
    whole, by_block, offloaded = (damage(model, pair, how) for model, how in models)
    for other in (by_block, offloaded):
        torch.testing.assert_close(other.alone.mean, whole.alone.mean, rtol=1e-6, atol=0)
        assert other.together_mean == pytest.approx(whole.together_mean, rel=1e-6)


@pytest.mark.parametrize("how", [WHOLE, BY_BLOCK])
def test_the_weights_are_the_same_bits_afterwards_even_after_an_error(how):
    model = narrow_model()
    before = copy.deepcopy(model.state_dict())

    def fail():
        with computing(model, how):
            assert own_dtype(model.lm_head) == torch.bfloat16
            model(torch.zeros((1, 4), dtype=torch.long), attention_mask=1 / 0)

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(v, before[n]) and v.dtype == before[n].dtype for n, v in model.state_dict().items())
    assert own_dtype(model.lm_head) is None


def test_every_group_counts_in_float32_where_bf16_is_blind():
    own = Precision("bfloat16", False, False, 1.0, 2.0)
    narrow, wide = (damage(narrow_model(), "wint8_afp16", how) for how in (own, WHOLE))
    assert (wide.alone.mean > 2 * wide.floor).all()
    assert (narrow.alone.mean > 2 * narrow.floor).sum() < len(narrow.floor)


@pytest.mark.parametrize("how", [WHOLE, BY_BLOCK])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("pair", ["wint8_afp16", "wfp8_afp8"])
def test_quantizers_see_and_give_what_they_do_in_bf16(pair, keep, how):
    model = narrow_model()
    scheme = scheme_of(model, qkv=candidate(pair))
    ranges = find_ranges(model, [scheme], CALIBRATION)
    name = next(iter(scheme.modules))
    linear = model.get_submodule(name)
    x = torch.randn(5, linear.in_features, dtype=torch.bfloat16)
    quantized = {}
    with apply_scheme(model, scheme, ranges, keep_weights=keep):
        quantized["bf16"] = linear(x)
    with computing(model, how), apply_scheme(model, scheme, ranges, keep_weights=keep):
        quantized["float32"] = linear(x.float())
    assert quantized["float32"].dtype == torch.float32
    assert torch.equal(quantized["float32"].bfloat16(), quantized["bf16"])


@pytest.mark.parametrize("how", ["auto", "model"])
def test_a_probe_says_what_it_was_measured_in(how):
    model = narrow_model()
    info = replace(INFO, dtype="bfloat16")
    result = probed(model, [scheme_of(model, qkv=candidate("wint8_afp16"))], info, how)
    assert result.dtype == {"auto": "float32", "model": "bfloat16"}[how]
    assert result.memory["measure_estimate_gb"] > 0
    if how == "auto":
        assert result.schemes[0].difference.kl > 100 * result.floor.kl


def test_what_does_not_fit_is_widened_block_by_block_or_refused_with_the_number(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=4).bfloat16()
    own = sum(p.numel() * p.element_size() for p in model.parameters())

    def planned(free, wanted):
        monkeypatch.setattr(precision, "free_bytes", lambda _device: free - own)
        return plan_precision(model, 64, wanted)

    whole = planned(1e12, "auto")
    assert whole.widened
    assert not whole.by_block
    by_block = planned(whole.estimate_gb * 1e9, "auto")  # all of it, and nothing kept free
    assert by_block.by_block
    assert own / 1e9 < by_block.estimate_gb < whole.estimate_gb
    with pytest.raises(UserError, match=r"measuring in float32 takes .* GB.*offload"):
        planned(whole.estimate_gb * 1e9, "float32")
    with pytest.raises(UserError, match="GB are free"):
        planned(by_block.estimate_gb * 1e9, "auto")
    assert not planned(0, "model").widened


def test_a_float32_model_is_measured_as_it_is():
    assert not plan_precision(tiny_model("llama"), 64, "auto").widened
    assert plan_precision(tiny_model("llama"), 64, "model").dtype == "float32"
