"""The damage by position, by confidence and by source, from numbers made by hand."""

import numpy as np
import pytest
import torch

from layerbits.errors import UserError
from layerbits.inputs.calibration import Segment
from layerbits.inputs.captions import CaptionSet
from layerbits.inputs.pictures import Pictured
from layerbits.probing.slices import confidences, places, slices
from layerbits.probing.texts import probe_texts, read_texts


def test_the_mean_of_a_slice_is_of_its_tokens_alone():
    kl = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = {s.name: s for s in slices(kl, np.array([0.0, 0.1, 0.3, 0.6, 0.99]), np.array([0.1, 0.3, 0.3, 0.95, 0.9]))}
    assert (found["first quarter"].tokens, found["first quarter"].kl) == (2, 1.5)
    assert found["last quarter"].kl == 5
    assert found["sure 0.25–0.5"].kl == 2.5
    assert found["sure ≥ 0.9"].kl == 4.5
    assert "sure 0.5–0.9" not in found
    assert sum(found[name].tokens for name in found if "quarter" in name) == 5


def test_several_sources_are_slices_and_one_is_none():
    kl, half = np.array([1.0, 2.0, 6.0]), np.full(3, 0.5)
    found = {s.name: s.kl for s in slices(kl, half, half, ["code", "web", "code"])}
    assert (found["from code"], found["from web"]) == (3.5, 2.0)
    assert not [s for s in slices(kl, half, half, ["web"] * 3) if s.name.startswith("from")]


def test_texts_of_ones_own_take_turns_without_what_was_calibrated_on(tmp_path):
    (tmp_path / "code.txt").write_text("def f():\nA  Dog runs.\nreturn 1\n")
    (tmp_path / "web.txt").write_text("hello\n")
    captions = CaptionSet("everyday", "small", ("a dog runs.",), ("held out",), "d")
    found = probe_texts(captions, read_texts([str(tmp_path / "code.txt"), str(tmp_path / "web.txt")]))
    assert found.texts == ("def f():", "hello", "return 1")
    assert found.sources == found.in_rows(8) == ("code", "web", "code")
    assert (found.name, found.own) == ("code,web", True)


def test_pictures_and_captions_that_were_held_out_are_two_sources():
    chat = Pictured((), (), "row 1")
    captions = CaptionSet("mixed", "small", (), (chat, "one", chat, "two"), "d")
    found = probe_texts(captions)
    assert found.in_rows(1) == ("pictures", "everyday", "everyday")  # as held_out_rows numbers them
    assert found.in_rows(2) == ("pictures", "pictures", "everyday", "everyday")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["no.txt"], "cannot read the texts"),
        (["a/t.txt", "b/t.txt"], "two files of texts are called t"),
        (["known.txt"], "was calibrated on"),
    ],
)
def test_texts_that_cannot_be_measured_on_are_refused(tmp_path, names, words):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("x\n")
    (tmp_path / "known.txt").write_text("A dog runs.\n")
    captions = CaptionSet("everyday", "small", ("a dog runs.",), (), "d")
    with pytest.raises(UserError, match=words):
        probe_texts(captions, read_texts([str(tmp_path / name) for name in names]))


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
