"""How many requests a forward takes: by the memory that is free, and refused with the key that is to be set."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from layerbits.answers.batch import MOST, plan_batch
from layerbits.answers.harness import Lengths
from layerbits.errors import UserError
from layerbits.scoring import precision

from .scoring_support import tiny_model

LENGTHS = Lengths(chosen=100, written=0)


@pytest.fixture(scope="module")
def model():
    """A narrow model with a large vocabulary, whose logits are most of what it takes."""
    return tiny_model("llama", vocab_size=50_000, num_hidden_layers=2).bfloat16()


@pytest.fixture
def free(monkeypatch):
    def of(gigabytes):
        monkeypatch.setattr(precision, "free_bytes", lambda _device: 1e9 * gigabytes)

    return of


def needs(model, size, lengths=LENGTHS):
    """GB that a batch takes, where there is room for all of it."""
    return plan_batch(model, lengths, size, "auto")[1].estimate_gb


def test_where_there_is_room_the_batch_is_the_largest(model, free):
    free(1000)
    assert plan_batch(model, LENGTHS, None, "auto")[0] == MOST


@pytest.mark.parametrize("dtype", ["auto", "float32", "model"])
def test_where_there_is_little_the_batch_is_halved_until_it_fits(model, free, dtype):
    free(1000)
    wanted = {size: plan_batch(model, LENGTHS, size, dtype)[1].estimate_gb for size in (2, 4, 8)}
    free(1.2 * wanted[4])
    size, how = plan_batch(model, LENGTHS, None, dtype)
    assert size == 4
    assert how.fits
    assert how.estimate_gb == wanted[4] < wanted[8] < 2 * wanted[4] < 4 * wanted[2]


def test_a_batch_that_does_not_fit_is_refused_with_its_key(model, free):
    free(1000)
    eight, one = needs(model, 8), needs(model, 1)
    free(eight / 2)
    with pytest.raises(UserError, match=r"GB are free; use fewer requests at once \(eval_batch_size=auto\)"):
        plan_batch(model, LENGTHS, 8, "auto")
    free(one / 2)
    with pytest.raises(UserError, match="one request at a time is too much; use dtype=model"):
        plan_batch(model, LENGTHS, None, "auto")
    assert plan_batch(model, LENGTHS, None, "model")[0] == 1  # the model's own dtype is never refused


def test_a_written_answer_needs_the_logits_of_one_token_alone(model, free):
    free(1000)
    chosen, written = (needs(model, 4, lengths) for lengths in (LENGTHS, Lengths(chosen=0, written=100)))
    assert written < chosen / 2
    assert needs(model, 4, Lengths(chosen=100, written=100)) == chosen


def test_rows_are_refused_with_the_remedy_that_is_given(model, free):
    free(0)
    with pytest.raises(UserError, match=r"GB are free; use fewer rows \(rows\)"):
        precision.plan_precision(model, 64, "auto", "use fewer rows (rows)")


def test_the_output_head_is_not_counted_for_several_tiles(model, free, monkeypatch):
    """A probe of a model with a large vocabulary was refused for logits that are never there together."""
    free(1000)
    before = precision.plan_precision(model, 64, "auto").estimate_gb
    monkeypatch.setitem(precision._TILES, "cpu", 1 << 14)
    tiled = precision.plan_precision(model, 64, "auto").estimate_gb
    body = max(
        sum(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert before < tiled < before + 4 * 4 * (1 << 14) * body / 1e9
