"""Questions of a task as rows: only the answer counts in the loss."""

import json

import pytest

from layerbits.errors import UserError
from layerbits.inputs.calibration import build_calibration, build_rows
from layerbits.inputs.captions import Question, load_captions, read_questions


class Letters:
    """A tokenizer with a token per letter."""

    eos_token_id, bos_token_id, pad_token_id = 1, None, 0

    def __call__(self, text, add_special_tokens=True):
        one = [ord(c) for c in text] if isinstance(text, str) else [[ord(c) for c in t] for t in text]
        return {"input_ids": one}


ROWS = [Question("2 + 2 =", " 4"), Question("The sky is", " blue")]


def counted(batches):
    """The text that counts in each row."""
    return [
        "".join(chr(t) for t, m in zip(row.tolist(), mask.tolist(), strict=True) if m)
        for batch in batches
        for segment in batch.segments
        for row, mask in zip(segment.input_ids, segment.loss_mask, strict=True)
    ]


def test_only_the_answer_counts_and_not_what_ends_it():
    (batch,) = build_rows(ROWS, Letters(), "padded", 20, 8)
    assert counted([batch]) == [" 4", " blue"]
    assert batch.loss_tokens == 7


def test_the_model_sees_the_prompt():
    (batch,) = build_rows(ROWS, Letters(), "padded", 20, 8)
    (segment,) = batch.segments
    assert segment.attention_mask.sum(1).tolist() == [10, 16]


def test_packed_rows_count_the_answers_too():
    assert "".join(counted(build_rows(ROWS, Letters(), "packed", 13, 8))) == " 4 blue"


def test_captions_count_as_before():
    (batch,) = build_rows(["abc", "de"], Letters(), "padded", 6, 8)
    assert counted([batch]) == ["bc\x01", "e\x01"]


def test_a_part_of_the_questions_is_scored():
    made = build_calibration(ROWS, Letters(), "padded", 20, 8, 1)
    assert counted(made.score) == [" 4"]
    assert counted(made.calib) == [" 4", " blue"]


def test_an_answer_beyond_the_row_is_refused():
    with pytest.raises(UserError, match="beyond the 7 tokens of a row"):
        build_rows(ROWS, Letters(), "padded", 7, 8)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_read_from_json_lines_and_held_out_ones_differ(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "answer": f" {i + 1}"} for i in range(30)]
    found = load_captions("task", "20", write(tmp_path / "rows.jsonl", *rows))
    assert [c[: c.answer] for c in found.captions] == [r["prompt"] for r in rows[:20]]
    assert [c[c.answer :] for c in found.held_out] == [r["answer"] for r in rows[20:]]


def test_where_the_answer_starts_is_part_of_the_digest(tmp_path):
    pairs = [("ab", "c"), ("a", "bc")]
    files = [write(tmp_path / f"{i}.jsonl", {"prompt": a, "answer": b}) for i, (a, b) in enumerate(pairs)]
    assert len({load_captions("task", "1", file).digest for file in files}) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"prompt": "a"}', "line 1 is no question"),
        ("a caption", "line 1 is no question"),
        ('{"prompt": "a", "answer": "b"}\n[1]', "line 2 is no question"),
        ('{"prompt": "", "answer": "b"}', "line 1 has an empty prompt or answer"),
        ("\n", "has no questions"),
    ],
)
def test_a_file_of_something_else_is_refused(data, words):
    with pytest.raises(UserError, match=words):
        read_questions(data.encode(), "rows.jsonl")
