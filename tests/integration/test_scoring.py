"""The one-pass engine against ModelOpt's own search, and what a pass does when something is wrong."""

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Batch, Segment
from layerbits.scoring import onepass, stock
from layerbits.scoring.quantizers import distinct_settings
from layerbits.scoring.steplog import StepLog
from layerbits.scoring.steps import calibration_forward, loss_logits
from layerbits.scoring.taps import Taps
from tests.autograd import autograd_scores

from .scoring_support import (
    SIX,
    candidate,
    configs,
    distinct_candidates,
    job,
    loaded,
    random_segment,
    recipe,
    rows,
    search_config,
    tiny_model,
)

# stock ranges each weight of its own: what a shared range does is tested with the exports
DISTINCT = [made for made in distinct_candidates() if made.info.granularity != "w_shared"]


@pytest.fixture(scope="module")
def llama():
    return loaded(tiny_model("llama"))


@pytest.fixture(scope="module")
def every_candidate(llama, tmp_path_factory):
    """One pass over every distinct candidate that runs on a CPU."""
    wanted = {c.info.name: search_config(c) for c in DISTINCT}
    return wanted, onepass.score(job(llama, tmp_path_factory.mktemp("pass"), wanted))


@pytest.fixture(scope="module")
def by_stock(llama, every_candidate, tmp_path_factory):
    """Scores of one candidate by ModelOpt's own search, computed once."""
    wanted, _ = every_candidate
    return cache(lambda name: stock.score(job(llama, tmp_path_factory.mktemp("stock"), {name: wanted[name]})))


@pytest.mark.parametrize("name", [c.info.name for c in DISTINCT])
def test_one_pass_scores_equal_stock_scores(name, by_stock, every_candidate):
    wanted, one = every_candidate
    reference = by_stock(name)
    column = list(wanted).index(name)
    np.testing.assert_allclose(one.raw[:, column], reference.raw[:, 0], rtol=1e-6)
    np.testing.assert_allclose(one.predicted_kl[:, column], reference.predicted_kl[:, 0], rtol=1e-6)
    assert one.groups == reference.groups


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("bits", [13.0, 11.0, 9.0])
def test_modelopt_makes_the_same_recipe_of_both_states(name, bits, by_stock, every_candidate):
    one, reference = every_candidate[1], by_stock(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert recipe(one.states[name], bits) == recipe(reference.states[name], bits)


def test_samples_sum_to_the_predicted_kl(every_candidate):
    one = every_candidate[1]
    np.testing.assert_allclose(one.sample_kl.sum(axis=0), one.predicted_kl, rtol=1e-9)


def test_lean_equals_fast(llama, tmp_path):
    fast = onepass.score(job(llama, tmp_path / "fast", configs(*SIX), memory="fast"))
    lean = onepass.score(job(llama, tmp_path / "lean", configs(*SIX), memory="lean"))
    np.testing.assert_array_equal(fast.raw, lean.raw)


def test_splitting_a_batch_changes_the_raw_score_but_not_the_predicted_kl(llama, tmp_path):
    first, second = random_segment(2, 16, seed=1), random_segment(2, 16, seed=2, first=7)
    whole = onepass.score(job(llama, tmp_path / "whole", configs("wint8_afp16"), rows([first, second])))
    split = onepass.score(job(llama, tmp_path / "split", configs("wint8_afp16"), rows([first], [second])))
    np.testing.assert_allclose(whole.predicted_kl, split.predicted_kl, rtol=1e-5)
    assert (split.raw > 1.5 * whole.raw).all()


def test_a_short_last_row_scores_as_if_it_were_padded_and_masked(llama, tmp_path):
    full, short = random_segment(1, 16, seed=1), random_segment(1, 9, seed=2, first=4)
    padded = Segment(
        torch.cat([full.input_ids, torch.nn.functional.pad(short.input_ids, (0, 7))]),
        torch.cat([torch.ones(1, 16), torch.nn.functional.pad(torch.ones(1, 9), (0, 7))]).long(),
        torch.cat([full.loss_mask, torch.nn.functional.pad(short.loss_mask, (0, 7))]),
        torch.cat([full.sample, torch.nn.functional.pad(short.sample, (0, 7), value=-1)]),
    )
    without = onepass.score(job(llama, tmp_path / "without", configs("wint8_afp16"), rows([full, short])))
    masked = onepass.score(job(llama, tmp_path / "masked", configs("wint8_afp16"), rows([padded])))
    np.testing.assert_allclose(without.raw, masked.raw, rtol=1e-4)


def test_an_uncalibrated_static_input_quantizer_is_calibrated():
    made = candidate("wfp4_afp8")
    assert made.search_config()["algorithm"] == "max"
    assert any("algorithm" in line for line in made.info.adjustments)


@pytest.mark.parametrize("engine", [onepass, stock])
def test_an_engine_leaves_the_model_as_it_was(engine, llama, tmp_path):
    ids = random_segment(1, 12).input_ids
    before = llama.model(ids).logits
    engine.score(job(llama, tmp_path, configs("wint8_aint8")))
    assert torch.equal(llama.model(ids).logits, before)
    assert not llama.model.training
    assert {type(llama.model.get_submodule(n)) for n in llama.linears} == {torch.nn.Linear}
    assert all(p.grad is None for p in llama.model.parameters())


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_only_the_language_model_of_a_vision_model_is_scored(kind, tmp_path):
    subject = loaded(tiny_model(kind))
    tower = {n: p.clone() for n, p in subject.model.named_parameters() if "visual" in n}
    scores = onepass.score(job(subject, tmp_path, configs("wfp8_afp8")))
    assert all(m.startswith("model.language_model.layers.") for g in scores.groups for m in g.modules)
    assert len(scores.groups) == 8
    assert all(torch.equal(p, tower[n]) for n, p in subject.model.named_parameters() if n in tower)


def test_a_killed_pass_goes_on_from_its_last_finished_step(llama, tmp_path, monkeypatch):
    whole = onepass.score(job(llama, tmp_path / "whole", configs("wfp8_afp8")))
    write = StepLog.write

    def killed(self, index, step):
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, step)

    monkeypatch.setattr(StepLog, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        onepass.score(job(llama, tmp_path / "killed", configs("wfp8_afp8")))
    done = []
    monkeypatch.setattr(StepLog, "write", lambda self, index, step: done.append(index) or write(self, index, step))
    again = onepass.score(job(llama, tmp_path / "killed", configs("wfp8_afp8")))
    assert done == [1]
    assert again.resumed
    np.testing.assert_array_equal(again.raw, whole.raw)


def test_the_stock_engine_takes_its_scores_from_a_finished_checkpoint(llama, tmp_path):
    first = stock.score(job(llama, tmp_path, configs("wint8_aint8")))
    again = stock.score(job(llama, tmp_path, configs("wint8_aint8")))
    assert again.resumed
    np.testing.assert_array_equal(again.raw, first.raw)
    np.testing.assert_array_equal(again.predicted_kl, first.predicted_kl)


@pytest.mark.parametrize("engine", [onepass, stock])
def test_a_checkpoint_of_other_parameters_is_refused(engine, llama, tmp_path):
    engine.score(job(llama, tmp_path, configs("wint8_afp16")))
    with pytest.raises(UserError, match="made with other parameters"):
        engine.score(job(llama, tmp_path, configs("wint8_afp16"), fingerprint="another"))


def test_a_damaged_stock_checkpoint_is_scored_again(llama, tmp_path):
    first = stock.score(job(llama, tmp_path, configs("wint8_afp16")))
    checkpoint = tmp_path / "autoquant_checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"):
        again = stock.score(job(llama, tmp_path, configs("wint8_afp16")))
    np.testing.assert_array_equal(again.raw, first.raw)


def test_scores_that_are_not_finite_name_module_candidate_and_sample_and_are_not_quantized(tmp_path):
    subject = loaded(tiny_model("llama"))
    name = "model.layers.1.mlp.down_proj"

    def spoil(_module, _args, output):
        if output.requires_grad:
            output.register_hook(lambda g: torch.where(torch.arange(g.shape[1])[:, None] == 3, torch.nan, g))

    handle = subject.model.get_submodule(name).register_forward_hook(spoil)
    calibration = rows([random_segment(1, 16)])
    scores = onepass.score(job(subject, tmp_path, configs("wint8_afp16"), calibration, target_bits=12.0))
    handle.remove()
    (group,) = [i for i, g in enumerate(scores.groups) if name in g.modules]
    assert np.isnan(scores.raw[group, 0])
    assert not scores.chosen["wint8_afp16"][group]
    assert (scores.groups[group].key, "wint8_afp16", 0) in {(n.group, n.candidate, n.sample) for n in scores.nonfinite}


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path):
    subject = loaded(tiny_model("llama"))
    with torch.no_grad():
        subject.model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"weight of model\.layers\.0\.mlp\.up_proj is not finite"):
        onepass.score(job(subject, tmp_path, configs("wint8_afp16")))


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_linear_that_is_called_twice_is_scored_by_both_calls(mode, tmp_path):
    subject = loaded(tiny_model("llama"))
    down = subject.model.get_submodule("model.layers.0.mlp.down_proj")
    mlp = subject.model.get_submodule("model.layers.0.mlp")
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + down(x.repeat(1, 1, 2))
    wanted = job(subject, tmp_path, configs("wint8_afp16"), memory=mode)
    np.testing.assert_allclose(onepass.score(wanted).raw[:, 0], autograd_scores(wanted), rtol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_what_a_model_changes_in_place_is_scored_as_it_was(mode, tmp_path):
    changing, plain = (loaded(tiny_model("llama")) for _ in range(2))

    def mlp(subject, after):
        module = subject.model.get_submodule("model.layers.0.mlp")

        def forward(x):
            inner = module.act_fn(module.gate_proj(x)) * module.up_proj(x)
            return after(inner, module.down_proj(inner))

        module.forward = forward

    mlp(changing, lambda inner, output: (inner.detach().zero_(), output.add_(1))[1])
    mlp(plain, lambda _inner, output: output + 1)
    found = onepass.score(job(changing, tmp_path, configs("wint8_afp16"), memory=mode))
    expected = autograd_scores(job(plain, tmp_path, configs("wint8_afp16")))
    np.testing.assert_allclose(found.raw[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["smoothquant", "awq_lite"])
def test_other_calibration_algorithms_are_left_to_stock(algorithm, llama, tmp_path):
    wanted = {name: {**config, "algorithm": algorithm} for name, config in configs("wint8_aint8").items()}
    with pytest.raises(Unsupported, match="engine=stock"):
        onepass.score(job(llama, tmp_path, wanted))


def test_a_batch_counts_its_own_loss_tokens():
    batch = Batch((random_segment(2, 8), random_segment(1, 5)))
    assert batch.loss_tokens == 2 * 7 + 4


def test_no_keys_and_values_are_kept_for_a_next_token(monkeypatch):
    subject = loaded(tiny_model("qwen3_vl"))
    assert subject.model.config.text_config.use_cache
    updates = []
    monkeypatch.setattr(DynamicCache, "update", lambda *arguments, **_: updates.append(1) or arguments[1:3])
    batch = rows([random_segment(2, 20, seed=1)]).score[0]
    calibration_forward(subject.model, batch, need_logits=False)
    loss_logits(subject.model, batch)
    assert not updates


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_candidates_with_the_same_input_share_a_product():
    """Six pairs have two activation precisions, twelve have three: that many products a linear, not one a pair."""
    subject = loaded(tiny_model("llama"))
    batch = rows([random_segment(2, 20, seed=1)])
    scored = [n for n in subject.linears if n != "lm_head"]
    weights, activations = ("fp4", "fp8", "int8", "int4"), ("fp16", "fp8", "int8")
    every = [f"w{weight}_a{activation}" for weight in weights for activation in activations]
    for pairs, inputs in ((SIX, 2), (every, 3)):
        taps = Taps(subject.model, scored, distinct_settings(list(configs(*pairs).values())))
        taps.calibrate(batch.calib, need_logits=False)
        taps.load_ranges(taps.ranges())
        with Products() as products:
            taps.score(batch.score[0], chunked=False)
        forward_and_backward = 2 * len(subject.linears)
        assert products.calls == forward_and_backward + inputs * len(scored)
