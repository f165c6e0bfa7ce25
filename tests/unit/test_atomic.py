"""Whole or not at all: what readers see of files and folders while they are written, and after a process was killed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerbits
from layerbits.atomic import atomic, scratch_folder, whole_folder, why_no_file, why_unwritable, write_json
from layerbits.errors import UserError

SRC = str(Path(layerbits.__file__).parents[1])
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITING = """
import sys, time
from pathlib import Path
from layerbits.atomic import atomic, whole_folder
with whole_folder(Path(sys.argv[1], "mine")) as partial, atomic(Path(sys.argv[1], "file")) as file:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writing(tmp_path):
    """Another process in the middle of writing a file and a folder."""
    command = [sys.executable, "-c", WRITING, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SRC})
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def hidden(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_nothing_of_a_killed_process_has_the_name_of_the_whole_and_the_next_write_removes_it(writing, tmp_path):
    writing.kill()
    writing.wait()
    assert len(hidden(tmp_path)) == len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / "other.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_what_a_living_process_writes_is_left_alone(writing, tmp_path):
    with whole_folder(tmp_path / "mine") as partial:
        (partial / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["whole"]
    assert len(hidden(tmp_path)) == 2


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("first", "second"):
        with whole_folder(tmp_path / "mine") as partial:
            (partial / text).write_text(text)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["second"]
    assert not hidden(tmp_path)


def test_two_that_write_the_same_folder_leave_one_of_theirs(tmp_path):
    with whole_folder(tmp_path / "mine") as one:
        (one / "one").write_text("1")
        with whole_folder(tmp_path / "mine") as other:
            (other / "other").write_text("2")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["one"]
    assert not hidden(tmp_path)


def test_a_file_that_is_not_to_be_replaced_stays(tmp_path):
    (tmp_path / "file").write_text("first")
    with pytest.raises(FileExistsError), atomic(tmp_path / "file", replace=False) as file:
        file.write(b"second")
    assert (tmp_path / "file").read_text() == "first"
    assert not hidden(tmp_path)


def test_a_scratch_folder_is_gone_unless_it_was_renamed(tmp_path):
    with scratch_folder(tmp_path / "mine") as folder:
        (folder / "x").write_text("x")
    with scratch_folder(tmp_path / "kept") as folder:
        folder.rename(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, pytest.raises(UserError, match=r"cannot write .*/mine \(No space left on device\); buy a disk")),
        (ZeroDivisionError(), pytest.raises(ZeroDivisionError)),
    ],
)
def test_an_error_leaves_nothing_and_a_full_disk_is_told_with_the_mend(tmp_path, error, told):
    def write():
        with whole_folder(tmp_path / "mine", "buy a disk") as partial:
            (partial / "half").write_text("half")
            raise error

    with told:
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left"),
        (
            RuntimeError("[enforce fail at x.cc:1] . PytorchStreamWriter failed writing file"),
            "cannot be written",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (RuntimeError("CUDA out of memory"), None),
        (UserError("No space left on device"), None),
    ],
)
def test_which_errors_say_that_nothing_can_be_written(error, words):
    found = why_unwritable(error)
    assert (found is None) == (words is None)
    assert words is None or words in found


def test_a_file_in_the_place_of_a_folder_is_a_reason_that_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory\); free space or set output_root"):
        whole_folder(tmp_path / "file" / "result").__enter__()


def test_a_file_that_could_not_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    assert why_no_file(tmp_path) == "Is a directory"
    assert why_no_file(tmp_path / "file" / "costs.json") == "Not a directory"
    assert why_no_file(tmp_path / "costs.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
