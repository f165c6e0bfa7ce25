import numpy as np
import pytest
import torch

from layerbits.inputs.calibration import Batch, Segment
from layerbits.scoring.fisher import drawn_labels, windowed


def _batch(*shapes):
    segments = tuple(
        Segment(torch.zeros(s, dtype=torch.long), None, torch.ones(s, dtype=torch.bool), torch.zeros(s).long())
        for s in shapes
    )
    return Batch(segments)


def test_a_window_is_the_square_of_its_sum_over_linears_and_tokens():
    signed = torch.tensor([[[1.0, 2.0, -3.0, 4.0]], [[0.5, 0.5, 0.5, 0.5]]])
    found = windowed(signed, torch.zeros(4).long(), _batch((1, 4)), [0, 0], 1, window=2)
    assert found.shape == (1, 1, 4)
    assert float(found[0, 0, :2].sum()) == pytest.approx((1.5 + 2.5) ** 2)
    assert float(found[0, 0, 2:].sum()) == pytest.approx((-2.5 + 4.5) ** 2)


def test_no_window_reaches_into_the_next_row():
    signed = torch.ones(1, 1, 6)
    found = windowed(signed, torch.zeros(6).long(), _batch((2, 3)), [0], 1, window=4)
    assert float(found.sum()) == pytest.approx(3**2 + 3**2)


def test_padding_counts_nothing():
    signed = torch.ones(1, 1, 4)
    found = windowed(signed, torch.tensor([0, 0, -1, -1]), _batch((1, 4)), [0], 1, window=4)
    assert float(found.sum()) == pytest.approx(2**2)
    assert found[0, 0, 2:].tolist() == [0, 0]


def test_drawn_tokens_follow_the_prediction():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(20_000, 3)
    drawn = drawn_labels(seed=0, batch=0, draw=0)(logits, None)
    np.testing.assert_allclose(torch.bincount(drawn) / 20_000, [0.7, 0.2, 0.1], atol=0.02)


def test_the_same_seed_batch_and_draw_draw_the_same_tokens():
    logits = torch.zeros(50, 1000)
    first, again, other = (drawn_labels(3, 5, draw)(logits, None) for draw in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pieces_of_the_logits_draw_on_from_one_another_where_they_are(monkeypatch):
    made = []
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: made.append(device) or generator(device))
    logits = torch.zeros(50, 1000)
    labels = drawn_labels(0, 0, 0)
    first, second = labels(logits, None), labels(logits, None)
    assert made == [logits.device]
    assert not torch.equal(first, second)
