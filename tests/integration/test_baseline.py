"""The unquantized model's loss on the scored rows: measured in every engine, and what it makes of a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerbits.errors import UserError
from layerbits.results.baseline import BaselineLoss, check_first_batch
from layerbits.scoring import kl, onepass, stock
from layerbits.scoring.steps import predictions

from .scoring_support import configs, job, loaded, tiny_model, usual_rows


@pytest.fixture(scope="module")
def llama():
    return loaded(tiny_model("llama"))


@pytest.fixture(scope="module")
def expected(llama):
    """Mean loss of the tokens that came true, without an engine."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in usual_rows().score:
            for segment in batch.segments:
                logits, targets = predictions(llama.model, segment)
                total += float(-logits.double().log_softmax(-1).gather(1, targets[:, None]).sum())
                count += len(targets)
    return total / count


ENGINES = {
    "gradient": (onepass, "gradient", {}),
    "gradient, logits in pieces": (onepass, "gradient", {"pieces": True}),
    "gradient, lean": (onepass, "gradient", {"memory": "lean"}),
    "fisher": (onepass, "fisher", {"draws": 2}),
    "kl_div": (kl, "kl_div", {}),
    "stock": (stock, "gradient", {}),
    "stock kl_div": (stock, "kl_div", {}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_measures_the_same_loss_and_tells_that_of_the_first_batch(
    llama, expected, name, tmp_path, monkeypatch
):
    engine, method, changes = ENGINES[name]
    if changes.pop("pieces", False):
        monkeypatch.setattr("layerbits.scoring.steps.LOGITS_AT_ONCE", 5 * 384)
        monkeypatch.setattr("layerbits.scoring.memory.free_bytes", lambda _device: 0)
    told = []
    wanted = job(llama, tmp_path, configs("wint8_afp16"), method=method, **changes)
    scores = engine.score(replace(wanted, watch=lambda loss, tokens: told.append((loss, tokens))))
    assert scores.loss_per_token == pytest.approx(expected, rel=1e-5)
    ((first, tokens),) = told
    assert tokens == usual_rows().score[0].loss_tokens
    assert first == pytest.approx(expected, rel=0.2)


def test_a_resumed_pass_has_the_same_loss(llama, tmp_path):
    first = onepass.score(job(llama, tmp_path, configs("wint8_afp16")))
    again = onepass.score(job(llama, tmp_path, configs("wint8_afp16")))
    assert again.resumed
    assert again.loss_per_token == first.loss_per_token


def test_steps_of_an_earlier_version_are_scored_again(llama, tmp_path):
    first = onepass.score(job(llama, tmp_path, configs("wint8_afp16")))
    for file in tmp_path.glob("step-*.npz"):
        with np.load(file) as data:
            held = {name: data[name] for name in data.files if name != "loss"}
        np.savez(file, **held)
    again = onepass.score(job(llama, tmp_path, configs("wint8_afp16")))
    assert again.loss_per_token == first.loss_per_token
    np.testing.assert_array_equal(again.raw, first.raw)


# What it means


def test_a_model_that_predicts_is_accepted():
    assert BaselineLoss(4.4, 262_144).check() == ()


def test_half_way_to_guessing_is_a_warning_with_its_reasons():
    (line,) = BaselineLoss(9.5, 262_144).check("its tokenizer has <bos>")
    assert "loses 9.50 nats per token" in line
    assert "ln(262,144) = 12.48" in line
    assert "beginning-of-text token" in line
    assert "(its tokenizer has <bos>)" in line


@pytest.mark.parametrize("loss", [math.log(384), 9.0, math.inf, math.nan])
def test_guessing_or_worse_ends_the_run(loss):
    with pytest.raises(UserError, match=r"no less than the ln\(384\) = 5.95 .* model.random_weights=true"):
        BaselineLoss(loss, 384).check()


def test_a_first_batch_ends_a_run_only_where_it_is_large_enough():
    check_first_batch(9.0, 99, 384)
    with pytest.raises(UserError):
        check_first_batch(9.0, 100, 384)
