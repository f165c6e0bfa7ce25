"""Runs that hold nothing out: said when they are scored, and by what wants to measure."""

import pytest

from layerbits.errors import UserError
from layerbits.inputs.captions import load_captions
from layerbits.serving.texts import held_out_texts
from layerbits.stages.workbench import none_left


def captions(tmp_path, lines):
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"Text number {number}.\n" for number in range(lines)))
    return load_captions("text_file", "8", file)


def test_a_run_that_takes_its_whole_list_is_warned_of_and_a_longer_list_has_the_same_captions(tmp_path):
    whole = captions(tmp_path, 8)
    (warning,) = none_left(whole)
    assert warning.startswith("dataset.size=8 takes every caption of the list: none is left that probe and serve_check")
    longer = captions(tmp_path, 9)
    assert none_left(longer) == ()
    assert longer.digest == whole.digest


def test_a_serve_check_of_such_a_run_says_what_to_add(tmp_path):
    with pytest.raises(UserError, match=r"on every caption of its list, .* add captions at the end of the list"):
        held_out_texts(captions(tmp_path, 8).held_out, None, "packed", 128, 1000)
