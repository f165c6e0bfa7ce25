"""What a model cannot be given or run by is known before its weights are loaded."""

import re

import numpy as np
import pytest
import torch
import transformers as hf

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import build_calibration
from layerbits.inputs.language_model import find_language_model, foreign_parts
from layerbits.inputs.limits import check_causality, check_stock, dropout_of, limits_of
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import language_model_linears, scored_linears
from layerbits.scoring import onepass, stock

from .checkpoint_support import CAPTIONS, WORDS, save_tokenizer
from .scoring_support import VOCABULARY, configs, job, loaded, tiny_model, usual_rows

TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def opt(**changes):
    torch.manual_seed(0)
    values = {**TEXT, "ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 64, "dropout": 0.1}
    return hf.OPTForCausalLM(hf.OPTConfig(**{**values, **changes})).float().eval()


def smolvlm():
    torch.manual_seed(0)
    text = {**TEXT, "model_type": "llama", "intermediate_size": 256, "pad_token_id": 0}
    vision = {**SIGHT, "image_size": 32, "patch_size": 8}
    config = hf.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=5, pad_token_id=0, scale_factor=2)
    return hf.SmolVLMForConditionalGeneration(config).float().eval()


def git():
    torch.manual_seed(0)
    config = hf.GitConfig(**TEXT, intermediate_size=256, vision_config={**SIGHT, "image_size": 32, "patch_size": 8})
    return hf.GitForCausalLM(config).float().eval()


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4))


def falcon():
    return hf.FalconForCausalLM(hf.FalconConfig(**TEXT))


def rows(folder, seq_len=16, words=WORDS, **settings):
    """Calibration rows of a few captions, and their tokenizer."""
    save_tokenizer(folder, words, **settings)
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(folder)
    return build_calibration(CAPTIONS * 2, tokenizer, "packed", seq_len, 4, None), tokenizer


def limits(model):
    return limits_of(model, model.config, "tiny")


# Tokens


def test_rows_of_the_models_own_tokenizer_are_fine(tmp_path):
    given = rows(tmp_path, words=[*WORDS, *(f"w{i}" for i in range(360))])
    assert limits(tiny_model("llama")).check(*given) == ()


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gives token 6\d\d, the model has 384 tokens only.*put the model's own"):
        limits(tiny_model("llama")).check(*rows(tmp_path, first=600))


def test_a_tokenizer_of_few_tokens_is_told(tmp_path):
    (line,) = limits(tiny_model("llama")).check(*rows(tmp_path))
    assert line.startswith("the tokenizer knows 13 tokens, the model 384")


def test_unknown_words_are_told_and_refused_where_they_are_most(tmp_path):
    few = limits(tiny_model("llama")).check(*rows(tmp_path, words=[w for w in WORDS if w != "mat"]))
    assert re.match(r"1\d% of the tokens are <unk>", few[0])
    with pytest.raises(UserError, match=r"\d\d% of the tokens are <unk>.*not for this text"):
        limits(tiny_model("llama")).check(*rows(tmp_path, words=["dog", "mat"]))


# Positions


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gptj"])
def test_rows_within_the_positions_are_fine(kind, tmp_path):
    given = rows(tmp_path, words=[*WORDS, *(f"w{i}" for i in range(360))])
    assert limits(MODELS[kind]()).check(*given) == ()


def test_rows_beyond_rotary_positions_are_told(tmp_path):
    model = tiny_model("llama", max_position_embeddings=8)
    told = "\n".join(limits(model).check(*rows(tmp_path)))
    assert "rows of 16 tokens are longer than the 8 positions of tiny: it was not trained so far out" in told


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gptj"])
def test_rows_beyond_a_table_of_positions_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match=r"rows of 66 tokens .* 64 positions .* no others; set autoquant.seq_len=64"):
        limits(MODELS[kind]()).check(*rows(tmp_path, seq_len=66))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=64))


def gptj():
    values = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 16}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**values))


MODELS = {"llama": lambda: tiny_model("llama"), "opt": opt, "gpt2": gpt2, "gptj": gptj}


# The language model


def test_the_language_model_of_a_model_that_modelopt_does_not_know_is_found_by_structure():
    model = smolvlm()
    assert find_language_model(model)[0] == "model.text_model"
    linears = language_model_linears(model)
    assert {n for n in linears if not n.startswith("model.text_model.layers.")} == {"lm_head"}
    assert len(linears) == 2 * 7 + 1


def test_an_image_encoder_beside_the_blocks_is_no_part_of_the_language_model():
    model = git()
    assert foreign_parts(model) == ["git.image_encoder"]
    assert not any("image_encoder" in name for name in language_model_linears(model))


@pytest.mark.parametrize("make", [bloom, falcon, gpt2, opt], ids=lambda make: make.__name__)
def test_a_model_that_only_reads_is_its_own_language_model(make):
    model = make()
    assert find_language_model(model) == ("", model)


def test_smolvlm_is_scored(tmp_path):
    scores = onepass.score(job(loaded(smolvlm()), tmp_path, configs("wint8_afp16")))
    assert {g.key for g in scores.groups} == {f"B0{b}.{k}" for b in (0, 1) for k in ("qkv", "o", "gate_up", "down")}
    assert (scores.predicted_kl > 0).all()


def test_what_is_excluded_stays_out_of_the_search():
    model, linears = tiny_model("llama"), language_model_linears(tiny_model("llama"))
    spec = ModelSpec.from_mapping({"name": "tiny", "path": "x", "exclude": ["model.layers.0", "*.down_proj"]})
    left = scored_linears(model, spec)
    assert set(left) == {n for n in linears if ".layers.0." not in n and not n.endswith("down_proj")}


def test_a_linear_that_a_text_never_reaches_is_named_and_can_be_excluded(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].connector = torch.nn.Linear(128, 128)
    with pytest.raises(UserError, match=r"connector is never called .* model.exclude=.model.layers.1.connector."):
        onepass.score(job(loaded(model), tmp_path / "all", configs("wfp8_afp8")))
    left = scored_linears(model, ModelSpec("tiny", "x", exclude=("*.connector",)))
    scored = tuple(n for n in left if n != "lm_head")
    assert len(onepass.score(job(loaded(model), tmp_path / "left", configs("wfp8_afp8"), scored=scored)).groups) == 8


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        (["model.connector"], "model.exclude names model.connector, which is no linear of tiny"),
        (["model", "lm_head"], "leaves no linear of tiny"),
    ],
)
def test_excluding_nothing_or_everything_is_refused(patterns, line):
    with pytest.raises(UserError, match=line):
        scored_linears(tiny_model("llama"), ModelSpec("tiny", "x", exclude=tuple(patterns)))


# Left to right


def bert(decoder):
    torch.manual_seed(0)
    config = hf.BertConfig(**TEXT, intermediate_size=256, is_decoder=decoder, initializer_range=0.1)
    return hf.BertLMHeadModel(config).float().eval()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gptj"])
def test_a_causal_model_is_taken(kind):
    check_causality(MODELS[kind]().eval(), usual_rows(), "tiny")


def test_the_same_architecture_is_taken_as_a_decoder_alone():
    check_causality(bert(decoder=True), usual_rows(), "tiny")
    with pytest.raises(UserError, match="tiny is no causal language model: a later token changes"):
        check_causality(bert(decoder=False), usual_rows(), "tiny")


# ModelOpt's own search


@pytest.mark.parametrize("make", [bloom, falcon], ids=lambda make: make.__name__)
def test_what_modelopt_cannot_prepare_is_refused_for_stock(make):
    with torch.device("meta"):
        model = make()
    with pytest.raises(Unsupported, match=r"engine=stock cannot run a .*ForCausalLM.*use autoquant.engine=onepass"):
        check_stock(model)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_what_modelopt_can_run_is_not(kind):
    with torch.device("meta"):
        model = MODELS[kind]()
    check_stock(model)


def test_what_fails_in_modelopts_search_is_told_in_a_line(tmp_path):
    with pytest.raises(Unsupported, match=r"FalconForCausalLM, ModelOpt's search fails on it .RuntimeError: Output 0"):
        stock.score(job(loaded(falcon().float().eval()), tmp_path, configs("wint8_afp16")))


@pytest.mark.parametrize("make", [bloom, falcon], ids=lambda make: make.__name__)
def test_one_pass_scores_it(make, tmp_path):
    scores = onepass.score(job(loaded(make().float().eval()), tmp_path, configs("wint8_afp16")))
    assert (scores.predicted_kl > 0).all()


def test_dropout_is_found_in_modules_and_in_configs():
    assert dropout_of(opt(), opt().config) == 0.1
    assert dropout_of(gpt2(), gpt2().config) == 0.1
    assert dropout_of(tiny_model("llama"), tiny_model("llama").config) == 0.0


def test_without_dropout_one_pass_and_stock_agree(tmp_path):
    subject = loaded(opt(dropout=0.0))
    one, other = (e.score(job(subject, tmp_path / e.__name__, configs("wint8_afp16"))) for e in (onepass, stock))
    torch.testing.assert_close(torch.tensor(one.raw), torch.tensor(other.raw), rtol=1e-4, atol=0)
    assert one.loss_per_token == pytest.approx(other.loss_per_token, rel=1e-6)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_one_pass_scores_without_dropout_in_every_mode(mode, tmp_path):
    found, expected = (
        onepass.score(job(loaded(subject), tmp_path / name, configs("wint8_afp16"), memory=memory)).raw
        for name, subject, memory in (("found", opt(), mode), ("expected", opt(dropout=0.0), "fast"))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_with_dropout_stock_scores_a_noisier_model(tmp_path):
    noisy, quiet = loaded(opt()), loaded(opt(dropout=0.0))
    on = stock.score(job(noisy, tmp_path / "on", configs("wint8_afp16")))
    off = stock.score(job(quiet, tmp_path / "off", configs("wint8_afp16")))
    one = onepass.score(job(noisy, tmp_path / "one", configs("wint8_afp16")))
    assert abs(on.raw / off.raw - 1).max() > 0.01
    torch.testing.assert_close(torch.tensor(one.raw), torch.tensor(off.raw), rtol=1e-4, atol=0)
