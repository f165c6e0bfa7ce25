"""The damage by position and by confidence, from numbers made by hand."""

import numpy as np
import pytest
import torch

from layerbits.inputs.calibration import Segment
from layerbits.probing.slices import confidences, places, slices


def test_the_mean_of_a_slice_is_of_its_tokens_alone():
    kl = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = {s.name: s for s in slices(kl, np.array([0.0, 0.1, 0.3, 0.6, 0.99]), np.array([0.1, 0.3, 0.3, 0.95, 0.9]))}
    assert (found["first quarter"].tokens, found["first quarter"].kl) == (2, 1.5)
    assert found["last quarter"].kl == 5
    assert found["sure 0.25–0.5"].kl == 2.5
    assert found["sure ≥ 0.9"].kl == 4.5
    assert "sure 0.5–0.9" not in found
    assert sum(found[name].tokens for name in found if "quarter" in name) == 5


def test_a_place_is_a_share_of_the_row_without_its_padding():
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.zeros(2, 4, dtype=torch.int64)
    np.testing.assert_allclose(places(Segment(ids, attention, mask, ids)), [0.25, 0.5, 0.75, 0.5])
    np.testing.assert_allclose(places(Segment(ids, None, mask, ids)), [0.25, 0.5, 0.75, 0.25])


def test_confidence_is_the_largest_probability():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.softmax(-1).amax(-1).numpy()
    assert confidences(logits, logits.logsumexp(-1)) == pytest.approx(expected)
