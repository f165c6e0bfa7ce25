"""Predicted changes of log-odds against the difference that a small change of the weights makes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from layerbits.answers.predicted import _Document, _Tap


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


DOCUMENTS = [
    _Document(((1, 2, 3, 4), (1, 2, 5), (1, 2, 6, 7, 8)), (2, 1, 3), 0),
    _Document(((9, 8, 7), (9, 8, 3, 2)), (1, 2), 1),
]


def log_odds(model, document):
    lls = []
    for row, length in zip(document.rows, document.lengths, strict=True):
        ids = torch.tensor([row])
        told = model(input_ids=ids).logits[0].float().log_softmax(-1)
        lls.append(sum(told[i - 1, row[i]] for i in range(len(row) - length, len(row))))
    others = torch.stack([ll for i, ll in enumerate(lls) if i != document.right])
    return float(lls[document.right] - others.logsumexp(0))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_the_prediction_is_the_slope_of_the_log_odds_per_document(model, name):
    linear = model.get_submodule(name)
    change = 1e-3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forward = lambda x: torch.nn.functional.linear(x, linear.weight + change)  # noqa: E731
    with _Tap(model, {name: {"c": forward}}) as tap:
        (predicted,) = tap.changes(DOCUMENTS).values()
    with torch.no_grad():
        before = [log_odds(model, d) for d in DOCUMENTS]
        linear.weight += change
        after = [log_odds(model, d) for d in DOCUMENTS]
        linear.weight -= change
    np.testing.assert_allclose(predicted, np.subtract(after, before), rtol=0.05, atol=2e-6)


def test_the_model_is_left_as_it_was(model):
    with _Tap(model, {"model.layers.0.mlp.down_proj": {}}):
        pass
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_scheme_sums_its_quantized_groups():
    from layerbits.answers.predicted import PredictedChanges

    changes = {("B00.o", "h"): np.array([1.0, -2.0]), ("B01.o", "h"): np.array([0.5, 0.5])}
    predicted = PredictedChanges("cloze", changes)
    groups = [SimpleNamespace(key="B00.o"), SimpleNamespace(key="B01.o")]
    scheme = SimpleNamespace(candidates=[SimpleNamespace(name="c", config_hash="h")], groups=groups)
    scheme.assignment = ("c", None)
    np.testing.assert_array_equal(predicted.of_scheme(scheme), [1.0, -2.0])
    scheme.assignment = ("c", "c")
    np.testing.assert_array_equal(predicted.of_scheme(scheme), [1.5, -1.5])
    scheme.assignment = (None, None)
    np.testing.assert_array_equal(predicted.of_scheme(scheme), [0.0, 0.0])
