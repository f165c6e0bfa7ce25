"""Experts whose weights are in one tensor: one pass against ModelOpt's own search, routing, cost models."""

import copy
import warnings

import numpy as np
import pytest
import torch

from layerbits.inputs.experts import named_experts
from layerbits.probing.apply import apply_scheme
from layerbits.results.assignment import Assignment
from layerbits.results.result import Group
from layerbits.schemes import Scheme
from layerbits.scoring import kl, memory, onepass, stock
from layerbits.scoring.expert_weights import ExpertWeights
from layerbits.scoring.experts import ExpertsTap
from layerbits.scoring.quantizers import distinct_settings
from layerbits.scoring.search import Search
from layerbits.scoring.steplog import StepLog
from layerbits.scoring.steps import calibration_forward
from layerbits.scoring.taps import Taps
from layerbits.trust.measure import measure_damage
from layerbits.trust.validate import calibrated_linears

from .schemes_support import CALIBRATION, DATA, INFO, logits, probed
from .scoring_support import (
    candidate,
    configs,
    job,
    loaded,
    random_segment,
    recipe,
    rows,
    search_config,
    tiny_model,
    usual_rows,
)

PAIRS = ("wfp8_afp8", "wint4_aint8")
BUDGETS = (13.0, 11.0, 9.0)


@pytest.fixture(scope="module")
def mixture():
    """Two blocks of four experts, two of them for a token; the last expert is never chosen."""
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] *= 4
    return loaded(model)


@pytest.fixture(scope="module")
def one(mixture, tmp_path_factory):
    return onepass.score(job(mixture, tmp_path_factory.mktemp("one"), configs(*PAIRS)))


@pytest.fixture(scope="module")
def references(mixture, tmp_path_factory):
    found = {}
    for name, config in configs(*PAIRS).items():
        found[name] = stock.score(job(mixture, tmp_path_factory.mktemp("stock"), {name: config}))
    return found


def test_an_expert_module_is_one_group_with_all_its_weights(one):
    assert [g.key for g in one.groups[:3]] == ["B00.qkv", "B00.o", "B00.experts"]
    assert one.groups[2].weights == 4 * 3 * 128 * 128


@pytest.mark.parametrize("name", PAIRS)
def test_one_pass_scores_equal_stock_scores(name, one, references):
    reference = references[name]
    np.testing.assert_allclose(one.raw[:, PAIRS.index(name)], reference.raw[:, 0], rtol=1e-6)
    np.testing.assert_allclose(one.predicted_kl[:, PAIRS.index(name)], reference.predicted_kl[:, 0], rtol=1e-6)
    assert one.groups == reference.groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for bits in BUDGETS:
            assert recipe(one.states[name], bits) == recipe(reference.states[name], bits)


def test_ranges_made_on_the_fly_are_those_of_each_experts_tokens(mixture, tmp_path):
    wanted = configs("wint8_aint8", overlay="a_per_tensor_dynamic")
    made = onepass.score(job(mixture, tmp_path / "one", wanted))
    reference = stock.score(job(mixture, tmp_path / "stock", wanted))
    np.testing.assert_allclose(made.raw, reference.raw, rtol=1e-6)


def test_samples_sum_to_the_predicted_kl(one):
    np.testing.assert_allclose(one.sample_kl.sum(axis=0), one.predicted_kl, rtol=1e-9)


def test_lean_equals_fast(mixture, one, tmp_path):
    lean = onepass.score(job(mixture, tmp_path, configs(*PAIRS), memory="lean"))
    np.testing.assert_allclose(lean.raw, one.raw, rtol=1e-6)
    assert lean.routing == one.routing


def test_a_pass_that_was_killed_goes_on(mixture, one, tmp_path, monkeypatch):
    calls = []

    def once(self, index, step):
        if calls:
            raise KeyboardInterrupt
        calls.append(index)
        write(self, index, step)

    write = StepLog.write
    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", once)
        with pytest.raises(KeyboardInterrupt):
            onepass.score(job(mixture, tmp_path, configs(*PAIRS)))
    resumed = onepass.score(job(mixture, tmp_path, configs(*PAIRS)))
    assert resumed.resumed
    np.testing.assert_array_equal(resumed.raw, one.raw)
    assert resumed.routing == one.routing


@pytest.mark.parametrize("engine", [onepass, stock, kl])
def test_an_engine_leaves_the_model_as_it_was(engine, mixture, tmp_path):
    ids = random_segment(1, 12).input_ids
    before, implementation = mixture.model(ids).logits, mixture.model.config._experts_implementation
    method = "kl_div" if engine is kl else "gradient"
    engine.score(job(mixture, tmp_path, configs("wfp8_afp8"), rows([random_segment(1, 12)]), method=method))
    assert torch.equal(mixture.model(ids).logits, before)
    assert mixture.model.config._experts_implementation == implementation
    for name in named_experts(mixture.model):
        assert type(mixture.model.get_submodule(name)).__name__ == "Qwen3MoeExperts"
        assert [n for n, _ in mixture.model.get_submodule(name).named_children()] == ["act_fn"]


def test_kl_div_is_what_a_model_with_quantized_experts_predicts(mixture, tmp_path):
    calibration = rows([random_segment(1, 16, seed=4)])
    found = kl.score(job(mixture, tmp_path, configs("wfp8_afp16"), calibration, method="kl_div"))
    quantized = copy.deepcopy(mixture.model)
    taps = Taps(mixture.model, ["model.layers.1.mlp.experts"], _settings("wfp8_afp16"))
    taps.load_ranges({})
    experts = quantized.model.layers[1].mlp.experts
    experts.gate_up_proj.data, experts.down_proj.data = taps.taps[0].weights(0)
    ids = calibration.score[0].segments[0].input_ids
    p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (mixture.model, quantized))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.predicted_kl[5, 0] == pytest.approx(expected, rel=1e-4)


def test_fisher_scores_of_experts_are_squares_of_signed_sums(mixture, tmp_path):
    made = onepass.score(job(mixture, tmp_path, configs("wfp8_afp8"), method="fisher", draws=2))
    experts = [i for i, g in enumerate(made.groups) if g.key.endswith("experts")]
    assert (made.raw[experts] > 0).all()
    assert sum(made.routing[0].scoring) == 2 * sum(s.input_ids.numel() for b in usual_rows().score for s in b.segments)


def test_tokens_per_expert_are_counted_in_both_phases(mixture, one):
    counts = {}

    def see(module, args):
        counts[module] = counts.get(module, 0) + torch.bincount(args[1].flatten(), minlength=4)

    experts = [mixture.model.get_submodule(n) for n in named_experts(mixture.model)]
    handles = [m.register_forward_pre_hook(see) for m in experts]
    for batch in usual_rows().score:
        for segment in batch.segments:
            mixture.model(segment.input_ids)
    for handle in handles:
        handle.remove()
    assert [r.group for r in one.routing] == ["B00.experts", "B01.experts"]
    for module, routing in zip(experts, one.routing, strict=True):
        assert routing.scoring == routing.calibration == tuple(counts[module].tolist())


def test_active_experts_alone_count_in_the_budget_of_that_cost_model(mixture, tmp_path):
    unit = {"cost_model": "active_moe", "active_ratio": 0.5, "target_bits": 11.0}
    made = onepass.score(job(mixture, tmp_path / "one", configs("wfp8_afp8"), **unit))
    reference = stock.score(job(mixture, tmp_path / "stock", configs("wfp8_afp8"), **unit))
    assert made.groups == reference.groups
    assert [g.active for g in made.groups[:3]] == [1.0, 1.0, 0.5]
    assert made.chosen == reference.chosen
    (state,), (theirs,) = made.states.values(), reference.states.values()
    assert state["cost_denominator"] == theirs["cost_denominator"]
    for name, stats in state["candidate_stats"].items():
        assert stats["costs"] == theirs["candidate_stats"][name]["costs"]


def test_experts_are_quantized_once_a_pass_where_copies_fit(mixture, tmp_path, monkeypatch):
    calls = []
    quantize = ExpertWeights.__call__
    monkeypatch.setattr(ExpertWeights, "__call__", lambda self, weight: calls.append(1) or quantize(self, weight))
    found = []
    for free in (1e12, 1e7):
        monkeypatch.setattr(memory, "free_bytes", lambda _device, free=free: free)
        before = len(calls)
        made = onepass.score(job(mixture, tmp_path / str(free), configs(*PAIRS), memory="fast"))
        found.append((made.raw, len(calls) - before))
    (kept, once), (passing, each) = found
    np.testing.assert_array_equal(kept, passing)
    modules, settings, segments = 2, 2, 3
    assert once == modules * settings * 2, "two projections"
    assert each == once * segments


def test_another_implementation_of_the_experts_is_switched_and_told(mixture, tmp_path):
    mixture.model.set_experts_implementation("eager")
    try:
        made = onepass.score(job(mixture, tmp_path / "one", configs("wfp8_afp16")))
    finally:
        mixture.model.set_experts_implementation("grouped_mm")
    assert made.notes == ("the scored experts run as grouped_mm, not as experts_implementation=eager",)


def test_experts_without_a_gate_score_as_in_stock(tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.NemotronHConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=384, layers_block_type=["attention", "moe"], head_dim=32, mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=16, n_groups=2, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128,
    )  # fmt: skip
    subject = loaded(hf.NemotronHForCausalLM(config).float().eval())
    (name,) = named_experts(subject.model)
    assert named_experts(subject.model)[name].projections == ("up_proj", "down_proj")
    made = onepass.score(job(subject, tmp_path / "one", configs("wfp8_afp8")))
    reference = stock.score(job(subject, tmp_path / "stock", configs("wfp8_afp8")))
    np.testing.assert_allclose(made.raw, reference.raw, rtol=1e-6)


def test_a_scheme_on_experts_is_probed(mixture):
    made = candidate("wfp8_afp8")
    groups = (Group("B01.experts", 1, "other", ("model.layers.1.mlp.experts",), 1000),)
    scheme = Scheme(
        "mine", ("run",), INFO, DATA, groups, (made.info,), Assignment([made.info.name]), 9.0, None, 0.01, 1e-6, {}
    )
    (found,) = probed(mixture.model, [scheme]).schemes
    assert 0 < found.difference.kl < 1


def test_damage_of_experts_is_measured_alone_and_together(mixture, tmp_path):
    made = job(mixture, tmp_path, configs("wint8_aint8"), rows([random_segment(2, 16, seed=4)]), method="kl_div")
    search = Search.of(made)
    linears = calibrated_linears(made, search)
    damage = measure_damage(mixture.model, linears, search, made.calibration.score, disable_one=True)
    experts = [i for i, g in enumerate(search.groups) if g.key.endswith("experts")]
    alone = kl.score(made).predicted_kl[experts, 0]
    np.testing.assert_allclose(damage.alone.kl.sum(axis=0)[experts] / damage.alone.tokens.sum(), alone, rtol=1e-3)
    assert damage.together_mean > alone.max()
    assert (damage.floor[experts] < alone / 10).all()


@pytest.mark.parametrize("variant", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("keep_weights", [True, False])
def test_a_scheme_computes_what_modelopt_computes_with_its_config(variant, keep_weights, mixture):
    import modelopt.torch.quantization as mtq

    made = candidate("wfp4_afp8", variant=variant)
    name = "model.layers.1.mlp.experts"
    groups = (Group("B01.experts", 1, "other", (name,), 1000),)
    scheme = Scheme(
        "mine", ("run",), INFO, DATA, groups, (made.info,), Assignment([made.info.name]), 9.0, None, 0.01, 1e-6, {}
    )

    def forward_loop(model):
        for batch in CALIBRATION:
            calibration_forward(model, batch, need_logits=False)

    changed = mtq.quantize(copy.deepcopy(mixture.model), search_config(made), forward_loop)
    mtq.disable_quantizer(changed, lambda quantizer: not quantizer.startswith(name))
    before = logits(mixture.model)
    with apply_scheme(mixture.model, scheme, CALIBRATION, keep_weights=keep_weights):
        ours = logits(mixture.model)
    torch.testing.assert_close(ours, logits(changed), rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(logits(mixture.model), before)


def _settings(pair):
    return distinct_settings(list(configs(pair).values()))


def test_candidates_side_by_side_compute_what_each_does_alone(mixture):
    wanted = {**configs("wint8_aint8", "wint8_afp16"), **configs("wint8_aint8", overlay="a_per_token_dynamic")}
    index = torch.stack([torch.randperm(5)[:2] for _ in range(9)])  # number 4 stands for none of the four
    inputs = (torch.randn(9, 128), index, torch.rand(9, 2))
    output, gradient = torch.randn(9, 128), torch.randn(9, 128)

    def scored(configs):
        taps = Taps(mixture.model, ["model.layers.0.mlp.experts"], distinct_settings(configs))
        taps.calibrate(usual_rows().calib, need_logits=False)
        taps.load_ranges(taps.ranges())
        (tap,) = taps.taps
        found = tap.scores(inputs, output, gradient, False)
        return {number: scores for numbers, scores in found for number in numbers}

    together = scored(list(wanted.values()))
    assert len(together) == 3
    for number, config in enumerate(wanted.values()):
        torch.testing.assert_close(together[number], scored([config])[0], rtol=1e-6, atol=1e-6)


def test_the_loop_over_experts_computes_what_the_grouped_product_does(mixture, monkeypatch):
    from layerbits.scoring import experts as module

    name = "model.layers.0.mlp.experts"
    taps = Taps(mixture.model, [name], _settings("wint8_aint8"))
    taps.calibrate(usual_rows().calib, need_logits=False)
    taps.load_ranges(taps.ranges())
    (tap,) = taps.taps
    assert isinstance(tap, ExpertsTap)
    hidden = torch.randn(9, 128)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    forward = tap.quantized((0, 0))
    grouped = forward(hidden, index, weights)
    monkeypatch.setattr(module, "_grouped", lambda _module: None)
    torch.testing.assert_close(forward(hidden, index, weights), grouped, rtol=1e-5, atol=1e-6)
