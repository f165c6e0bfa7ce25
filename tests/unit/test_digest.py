"""The digest of a checkpoint folder: every byte that is loaded counts, and a large file is read once."""

import hashlib
import os
import time

import pytest

from layerbits.cache import cache_dir
from layerbits.errors import UserError
from layerbits.inputs import digest as module
from layerbits.inputs.digest import folder_digest

LARGE = bytes(3 << 20)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "model"
    (made / "code" / "inner").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "modeling_own.py").write_text("x = 1")
    (made / "code" / "inner" / "more.py").write_text("y = 1")
    (made / "tokenizer.tiktoken").write_text("a")
    (made / "model.safetensors").write_bytes(LARGE)
    return made


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read for their digest."""
    names = []
    original = hashlib.file_digest

    def file_digest(stream, name):
        names.append(os.path.basename(stream.name))
        return original(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    return names


def settle(monkeypatch):
    monkeypatch.setattr(module, "_SETTLED", -1.0)


def digest(folder):
    return folder_digest(folder, [folder / "model.safetensors"])


def edit(file, at, byte=b"\1"):
    """Changes a byte in place; size and time of change stay."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(byte)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py", "code/inner/more.py", "tokenizer.tiktoken"])
def test_every_small_file_counts(folder, name):
    before = digest(folder)
    edit(folder / name, 0)
    assert digest(folder) != before


def test_a_byte_in_the_middle_of_the_weights_counts_though_the_digest_was_kept(folder, monkeypatch):
    settle(monkeypatch)
    before = digest(folder)
    edit(folder / "model.safetensors", len(LARGE) // 2)
    assert digest(folder) != before
    edit(folder / "model.safetensors", len(LARGE) // 2, b"\0")
    assert digest(folder) == before


def test_a_large_file_is_read_once(folder, read, monkeypatch):
    settle(monkeypatch)
    first = digest(folder)
    assert digest(folder) == first
    assert read.count("model.safetensors") == 1
    assert read.count("config.json") == 2


def test_the_digest_of_a_file_that_was_changed_just_now_is_not_kept(folder, read):
    assert time.time() - (folder / "model.safetensors").stat().st_mtime < module._SETTLED
    digest(folder)
    digest(folder)
    assert read.count("model.safetensors") == 2


def test_a_copy_elsewhere_has_the_same_digest(folder, tmp_path):
    copy = tmp_path / "copy"
    folder.rename(copy)
    moved = digest(copy)
    copy.rename(folder)
    assert digest(folder) == moved


@pytest.mark.parametrize("name", ["README.md", "optimizer.pt", "events.out.tfevents.1", "training_args.bin", ".lock"])
def test_what_is_not_loaded_does_not_count(folder, name):
    before = digest(folder)
    (folder / name).write_text("x")
    assert digest(folder) == before


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    original = hashlib.file_digest

    def file_digest(stream, name):
        edit(folder / "model.safetensors", 5)
        return original(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    with pytest.raises(UserError, match=r"model\.safetensors changes while it is read; wait"):
        digest(folder)


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, read, monkeypatch, tmp_path):
    settle(monkeypatch)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LAYERBITS_CACHE", str(blocked / "cache"))
    assert digest(folder) == digest(folder)
    assert read.count("model.safetensors") == 2


def test_a_damaged_entry_of_the_cache_is_read_anew(folder, monkeypatch):
    settle(monkeypatch)
    first = digest(folder)
    for entry in (cache_dir() / "digests").glob("*"):
        entry.write_text("half")
    assert digest(folder) == first
