"""Captions as token rows, with a word-level tokenizer built in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from layerbits.errors import UserError
from layerbits.inputs import calibration
from layerbits.inputs.calibration import MIN_LOSS_TOKENS, build_calibration, build_rows, padding_share

settings.register_profile("no_deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no_deadline")

WORDS = [f"w{i}" for i in range(50)]
SPECIAL = ["<unk>", "<eos>", "<bos>", "<pad>"]


def opening_with(*tokens):
    single = " ".join([*tokens, "$A"])
    return processors.TemplateProcessing(single=single, special_tokens=[(t, 50 + SPECIAL.index(t)) for t in tokens])


def make_tokenizer(opens_with_bos=False, newline=False, **special):
    """Token id of ``w7`` is 7; the special tokens follow; ``special`` names those that the tokenizer knows."""
    vocab = {token: i for i, token in enumerate([*WORDS, *SPECIAL, "\n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed") if newline else pre_tokenizers.WhitespaceSplit()
    if opens_with_bos:
        backend.post_processor = opening_with("<bos>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


PLAIN = make_tokenizer(eos_token="<eos>")
BOS = make_tokenizer(eos_token="<eos>", bos_token="<bos>", opens_with_bos=True)
EOS = 51

caption_lists = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=12
)


def flat(batches, what="input_ids"):
    return [v for b in batches for s in b.segments for row in getattr(s, what) for v in row.tolist()]


def row_list(batches):
    return [row.tolist() for b in batches for s in b.segments for row in s.input_ids]


def stream(captions):
    """Tokens that the captions should become, and the caption of each."""
    pairs = [(t, i) for i, c in enumerate(captions) for t in [*(int(w[1:]) for w in c.split()), EOS]]
    return [t for t, _ in pairs], [i for _, i in pairs]


# Packed


@given(caption_lists, st.integers(2, 20), st.integers(1, 4))
def test_packed_rows_hold_every_caption_token_once_in_order(captions, seq_len, batch_size):
    batches = build_rows(captions, PLAIN, "packed", seq_len, batch_size)
    tokens, samples = stream(captions)
    lone = len(tokens) % seq_len == 1  # the last separator in a row of its own
    assert flat(batches) == tokens[: len(tokens) - lone]
    assert flat(batches, "sample") == samples[: len(tokens) - lone]
    assert [t for t in flat(batches) if t != EOS] == [t for t in tokens if t != EOS]


@given(caption_lists, st.integers(2, 20), st.integers(1, 4))
def test_packed_rows_are_full_but_for_the_last_and_never_padded(captions, seq_len, batch_size):
    batches = build_rows(captions, PLAIN, "packed", seq_len, batch_size)
    lengths = [len(row) for row in row_list(batches)]
    assert all(n == seq_len for n in lengths[:-1])
    assert 2 <= lengths[-1] <= seq_len
    assert all(s.attention_mask is None for b in batches for s in b.segments)
    assert padding_share(batches) == 0


@given(caption_lists, st.integers(2, 20), st.integers(1, 4), st.sampled_from(["packed", "padded"]))
def test_loss_tokens_are_tokens_minus_rows(captions, seq_len, batch_size, packing):
    batches = build_rows(captions, PLAIN, packing, seq_len, batch_size)
    real = sum(v >= 0 for v in flat(batches, "sample"))
    assert sum(b.loss_tokens for b in batches) == real - sum(b.rows for b in batches)
    assert all(b.loss_tokens > 0 for b in batches)


@given(caption_lists, st.integers(2, 20), st.integers(1, 4), st.sampled_from(["packed", "padded"]))
def test_loss_mask_is_every_real_token_but_the_first_of_a_row(captions, seq_len, batch_size, packing):
    for batch in build_rows(captions, PLAIN, packing, seq_len, batch_size):
        for segment in batch.segments:
            assert not segment.loss_mask[:, 0].any()
            assert torch.equal(segment.loss_mask[:, 1:], segment.sample[:, 1:] >= 0)


@given(caption_lists, st.integers(2, 20), st.integers(1, 4), st.sampled_from(["packed", "padded"]))
def test_batches_have_batch_size_rows_but_for_the_last(captions, seq_len, batch_size, packing):
    rows = [b.rows for b in build_rows(captions, PLAIN, packing, seq_len, batch_size)]
    assert all(n == batch_size for n in rows[:-1])
    assert 1 <= rows[-1] <= batch_size


@given(caption_lists, st.data(), st.integers(2, 20), st.integers(1, 4))
def test_rows_of_a_prefix_are_a_prefix_up_to_the_cut(captions, data, seq_len, batch_size):
    few = data.draw(st.integers(1, len(captions)))
    prefix = row_list(build_rows(captions[:few], PLAIN, "packed", seq_len, batch_size))
    whole = row_list(build_rows(captions, PLAIN, "packed", seq_len, batch_size))
    assert prefix[:-1] == whole[: len(prefix) - 1]
    assert whole[len(prefix) - 1][: len(prefix[-1])] == prefix[-1]


@given(caption_lists, st.integers(2, 20), st.integers(1, 3), st.integers(4, 6))
def test_batch_size_does_not_change_the_rows(captions, seq_len, one, other):
    first, second = (row_list(build_rows(captions, PLAIN, "packed", seq_len, n)) for n in (one, other))
    assert first == second


def test_partial_last_row_is_a_segment_of_its_own():
    (batch,) = build_rows(["w1 w2 w3 w4", "w5 w6"], PLAIN, "packed", 3, 8)
    assert [s.input_ids.tolist() for s in batch.segments] == [[[1, 2, 3], [4, EOS, 5]], [[6, EOS]]]
    assert [s.sample.tolist() for s in batch.segments] == [[[0, 0, 0], [0, 0, 1]], [[1, 1]]]
    assert batch.loss_tokens == 5


def test_last_separator_alone_makes_no_row():
    assert row_list(build_rows(["w1 w2 w3"], PLAIN, "packed", 3, 1)) == [[1, 2, 3]]


def test_tensor_types():
    (batch,) = build_rows(["w1 w2", "w3"], PLAIN, "padded", 4, 8)
    (segment,) = batch.segments
    assert segment.input_ids.dtype == torch.int64
    assert segment.attention_mask.dtype == torch.int64
    assert segment.loss_mask.dtype == torch.bool
    assert segment.sample.dtype == torch.int32
    assert segment.input_ids.is_contiguous()


# Padded


def test_padded_rows_hold_one_caption_each():
    (batch,) = build_rows(["w1 w2", "w3"], make_tokenizer(eos_token="<eos>", pad_token="<pad>"), "padded", 4, 8)
    (segment,) = batch.segments
    assert segment.input_ids.tolist() == [[1, 2, EOS, 53], [3, EOS, 53, 53]]
    assert segment.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert segment.loss_mask.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert segment.sample.tolist() == [[0, 0, 0, -1], [1, 1, -1, -1]]


@pytest.mark.parametrize(
    ("special", "pad"), [({"eos_token": "<eos>"}, EOS), ({"bos_token": "<bos>"}, 0), ({"pad_token": "<pad>"}, 53)]
)
def test_tokenizer_without_a_pad_token_pads_under_the_mask(special, pad):
    (batch,) = build_rows(["w1"], make_tokenizer(newline=True, **special), "padded", 4, 1)
    (segment,) = batch.segments
    assert segment.input_ids[0, 2:].tolist() == [pad, pad]
    assert segment.attention_mask.tolist() == [[1, 1, 0, 0]]


def test_padded_share_is_reported_and_warned_about():
    built = build_calibration(["w1 w2", "w3"], PLAIN, "padded", 5, 8, None)
    assert built.padding_share == 0.5
    assert any(w.startswith("50.0% of the calibration tokens are padding") for w in built.warnings)


def test_cut_captions_are_counted():
    built = build_calibration(["w1 w2 w3 w4", "w5", "w6 w7 w8"], PLAIN, "padded", 3, 8, None)
    assert any(w.startswith("2 of 3 captions are longer than a row") for w in built.warnings)
    assert row_list(built.calib) == [[1, 2, 3], [5, EOS, EOS], [6, 7, 8]]


def test_packed_cuts_nothing_and_does_not_warn_of_it():
    built = build_calibration(["w1 w2 w3 w4"], PLAIN, "packed", 3, 8, None)
    assert len(built.warnings) == 1  # only that there are few tokens


# Special tokens


def test_separator_falls_back_to_bos_then_to_a_newline():
    assert row_list(build_rows(["w1"], make_tokenizer(bos_token="<bos>"), "packed", 4, 1)) == [[1, 52]]
    assert row_list(build_rows(["w1"], make_tokenizer(newline=True), "packed", 4, 1)) == [[1, 54]]


def test_tokenizer_without_any_separator():
    with pytest.raises(UserError, match="set its eos_token"):
        build_rows(["w1"], make_tokenizer(), "packed", 4, 1)


def test_rows_open_with_bos_where_the_tokenizer_does_so():
    (batch,) = build_rows(["w1 w2", "w3 w4"], BOS, "packed", 4, 8)
    assert [s.input_ids.tolist() for s in batch.segments] == [[[52, 1, 2, EOS], [52, 3, 4, EOS]]]
    assert batch.segments[0].sample.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.loss_tokens == 6


@given(caption_lists, st.integers(2, 20))
def test_bos_rows_hold_every_caption_token_once(captions, seq_len):
    rows = row_list(build_rows(captions, BOS, "packed", seq_len, 3))
    assert all(row[0] == 52 and len(row) <= seq_len for row in rows)
    assert [t for row in rows for t in row[1:]] == stream(captions)[0]


def test_bos_that_the_tokenizer_does_not_open_with_is_left_out():
    known = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    assert row_list(build_rows(["w1"], known, "padded", 2, 1)) == [[1, EOS]]


def opened(*tokens, **special):
    tokenizer = make_tokenizer(eos_token="<eos>", **special)
    tokenizer.backend_tokenizer.post_processor = opening_with(*tokens)
    return tokenizer


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_rows_open_with_all_tokens_that_the_tokenizer_opens_a_text_with(packing):
    tokenizer = opened("<pad>", "<bos>")  # as [gMASK]<sop>
    (batch,) = build_rows(["w1 w2", "w3 w4"], tokenizer, packing, 5, 8)
    (segment,) = batch.segments
    assert segment.input_ids.tolist() == [[53, 52, 1, 2, EOS], [53, 52, 3, 4, EOS]]
    assert segment.sample.tolist() == [[0] * 5, [1] * 5]
    assert segment.loss_mask.tolist() == [[False, False, True, True, True]] * 2


def test_a_row_that_goes_on_with_a_caption_opens_like_the_others():
    rows = row_list(build_rows(["w1 w2 w3 w4"], opened("<pad>", "<bos>"), "packed", 4, 8))
    assert rows == [[53, 52, 1, 2], [53, 52, 3, 4], [53, 52, EOS]]


def test_rows_open_with_a_token_that_is_not_the_begin_of_text_token():
    (row,) = row_list(build_rows(["w1"], opened("<pad>", bos_token="<bos>"), "packed", 4, 8))
    assert row == [53, 1, EOS]


def test_what_the_tokenizer_ends_a_text_with_opens_no_row():
    tokenizer = opened("<bos>", bos_token="<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 52), ("<eos>", EOS)]
    )
    assert row_list(build_rows(["w1"], tokenizer, "packed", 4, 8)) == [[52, 1, EOS]]


def test_rows_too_short_for_what_opens_them_are_refused():
    with pytest.raises(UserError, match=r"seq_len=2 leaves no token to predict behind the 2 that open a row; use 3"):
        build_rows(["w1"], opened("<pad>", "<bos>"), "packed", 2, 8)


def test_control_tokens_that_captions_spell_out_are_text_and_counted():
    backend = Tokenizer(models.WordLevel({"w1": 1, "<": 2, "eos": 3, ">": 4, "<unk>": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    eos = tokenizer.eos_token_id
    built = build_calibration(["w1 <eos>", "w1 w1"], tokenizer, "packed", 12, 8, None)
    assert row_list(built.calib) == [[1, 2, 3, 4, eos, 1, 1, eos]]
    assert built.warnings[0] == "1 of 2 captions spell out control tokens (<eos>), which were taken for text"


def test_control_tokens_that_a_tokenizer_must_read_are_counted():
    class Own(PreTrainedTokenizerFast):
        def __call__(self, text, **settings):
            if "split_special_tokens" in settings:
                raise TypeError("unknown")
            return super().__call__(text, **settings)

    tokenizer = Own(tokenizer_object=PLAIN.backend_tokenizer, unk_token="<unk>", eos_token="<eos>")
    built = build_calibration(["w1 <eos>", "w2"], tokenizer, "packed", 12, 8, None)
    assert row_list(built.calib) == [[1, EOS, EOS, 2, EOS]]
    assert built.warnings[0] == "1 of 2 captions spell out control tokens (<eos>): 1 were read as such"


# Scoring batches


def test_all_samples_are_scored_by_default():
    built = build_calibration(["w1 w2", "w3"], PLAIN, "packed", 2, 1, None)
    assert built.score_samples == 2
    assert row_list(built.score) == row_list(built.calib)


def test_score_batches_are_of_the_first_samples_only():
    built = build_calibration(["w1 w2", "w3", "w4"], PLAIN, "packed", 3, 2, 2)
    assert row_list(built.score) == [[1, 2, EOS], [3, EOS]]
    assert row_list(built.calib) == [[1, 2, EOS], [3, EOS, 4]]
    assert set(flat(built.score, "sample")) == {0, 1}
    assert (built.calib_rows, built.score_rows, built.score_samples) == (2, 2, 2)
    assert built.batch_loss_tokens == (3,)


@given(caption_lists, st.data(), st.sampled_from(["packed", "padded"]))
def test_every_scored_sample_is_in_a_batch_and_no_other(captions, data, packing):
    few = data.draw(st.integers(1, len(captions)))
    built = build_calibration(captions, PLAIN, packing, 7, 2, few)
    assert set(flat(built.score, "sample")) - {-1} == set(range(few))
    assert set(flat(built.calib, "sample")) - {-1} == set(range(len(captions)))


def test_too_few_loss_tokens_earn_a_warning(monkeypatch):
    monkeypatch.setattr(calibration, "MIN_LOSS_TOKENS", 5)
    captions = ["w1 w2 w3", "w4 w5"]  # 7 tokens in one row: 6 to predict; 3 of them in the first caption
    assert build_calibration(captions, PLAIN, "packed", 8, 1, None).warnings == ()
    (warning,) = build_calibration(captions, PLAIN, "packed", 8, 1, 1).warnings
    assert warning.startswith("only 3 loss tokens to rank by, fewer than 5")
    assert "autoquant.num_score_samples" in warning


def test_warning_about_few_tokens_names_the_size_when_all_are_scored():
    (warning,) = build_calibration(["w1 w2"], PLAIN, "packed", 8, 1, None).warnings
    assert "dataset.size" in warning
    assert f"{MIN_LOSS_TOKENS:,}" in warning


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1}, "autoquant.seq_len=1"),
        ({"batch_size": 0}, "autoquant.batch_size=0"),
        ({"packing": "loose"}, "dataset.packing=loose is not known; use one of packed, padded"),
        ({"num_score_samples": 0}, "autoquant.num_score_samples=0 must be between 1 and the 2"),
        ({"num_score_samples": 3}, "autoquant.num_score_samples=3 must be between 1 and the 2"),
    ],
)
def test_parameters_out_of_range(change, message):
    arguments = {"packing": "packed", "seq_len": 8, "batch_size": 2, "num_score_samples": None, **change}
    with pytest.raises(UserError) as error:
        build_calibration(["w1", "w2"], PLAIN, **arguments)
    assert message in str(error.value)


def test_no_captions():
    with pytest.raises(UserError, match="no captions"):
        build_rows([], PLAIN, "packed", 8, 1)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_captions_without_tokens(packing):
    with pytest.raises(UserError, match="no token to predict"):
        build_rows([" "], PLAIN, packing, 8, 1)
