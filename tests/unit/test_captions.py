"""Caption lists: the shipped one, files of one's own, and how a list is split."""

import hashlib
from importlib import resources
from pathlib import Path

import pytest
import yaml

from layerbits.cache import cache_dir
from layerbits.errors import UserError
from layerbits.inputs import captions as captions_module
from layerbits.inputs.captions import HELD_OUT, SIZES, load_captions, normalised, read_captions

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT.parent / "shared" / "reference" / "captions"


@pytest.fixture
def caption_file(tmp_path):
    def write(lines, name="captions.txt"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def numbered(count):
    return [f"Scene number {i}." for i in range(count)]


# The shipped list


@pytest.fixture(scope="module")
def shipped():
    return (resources.files("layerbits") / "data/everyday_captions.txt").read_text(encoding="utf-8").splitlines()


def test_shipped_list_fills_the_largest_size_and_the_held_out_split(shipped):
    assert len(shipped) >= SIZES["large"] + HELD_OUT


def test_shipped_captions_are_clean_sentences_of_6_to_20_words(shipped):
    for line in shipped:
        assert line == " ".join(line.split())
        assert line[0].isupper(), line
        assert line[-1] in ".!?", line
        assert 6 <= len(line.split()) <= 20, line


def test_shipped_captions_are_distinct_and_not_near_duplicates(shipped):
    words = [frozenset(normalised(line).strip(".").replace(",", "").split()) for line in shipped]
    assert len({normalised(line) for line in shipped}) == len(shipped)
    for i, first in enumerate(words):
        for second in words[:i]:
            assert len(first & second) <= 0.6 * len(first | second), (first, second)


def test_shipped_captions_vary_in_their_openings(shipped):
    pairs = {tuple(line.split()[:2]) for line in shipped}
    assert len(pairs) > len(shipped) / 2


# Sizes and the split


def test_smaller_sizes_are_prefixes_of_larger_ones():
    small, medium, large = (load_captions("everyday", size).captions for size in SIZES)
    assert [len(small), len(medium), len(large)] == [16, 128, 512]
    assert medium[:16] == small
    assert large[:128] == medium


def test_held_out_shares_no_line_with_any_size_and_is_the_same_for_all():
    sets = [load_captions("everyday", size) for size in (*SIZES, "64")]
    large = {normalised(c) for c in load_captions("everyday", "large").captions}
    assert {s.held_out for s in sets} == {sets[0].held_out}
    assert len(sets[0].held_out) == HELD_OUT
    assert not large & {normalised(c) for c in sets[0].held_out}


def test_size_may_be_a_number():
    assert load_captions("everyday", "5").captions == load_captions("everyday", "small").captions[:5]


@pytest.mark.parametrize("size", ["tiny", "0", "-3", "1.5", "", "²"])
def test_unknown_size_names_the_sizes(size):
    with pytest.raises(UserError, match="small, medium, large or a number"):
        load_captions("everyday", size)


def test_digest_is_of_the_calibration_captions_in_order(caption_file):
    path = caption_file(numbered(20))
    expected = hashlib.sha256("\n".join(numbered(16)).encode()).hexdigest()[:16]
    assert load_captions("text_file", "small", path).digest == expected
    swapped = caption_file([*reversed(numbered(16)), *numbered(20)[16:]])
    assert load_captions("text_file", "small", swapped).digest != expected


@pytest.mark.parametrize(
    ("lines", "size", "first", "count"),
    [
        (1000, "small", 512, 256),  # behind every named size, 256 of them
        (1000, "700", 700, 256),  # never inside the run's own captions
        (900, "800", 800, 100),
        (768, "large", 512, 256),
        (600, "small", 344, 256),  # too short for that: the last 256
        (600, "large", 512, 88),
        (100, "small", 16, 84),
        (16, "small", None, 0),
    ],
)
def test_where_the_held_out_split_starts(caption_file, lines, size, first, count):
    held_out = load_captions("text_file", size, caption_file(numbered(lines))).held_out
    assert len(held_out) == count
    if count:
        assert held_out[0] == f"Scene number {first}."


def test_reference_coco_sizes_are_what_this_module_cuts():
    if not COCO.exists():
        pytest.skip("the reference captions are not here")
    for size, count in SIZES.items():
        expected = (COCO / f"coco2017_captions_{size}.txt").read_text().splitlines()
        loaded = load_captions("text_file", size, COCO / "coco2017_captions_4096.txt")
        assert list(loaded.captions) == [line.strip() for line in expected]
        assert len(loaded.captions) == count
        assert not {normalised(c) for c in loaded.captions} & {normalised(c) for c in loaded.held_out}


# Files of one's own


def test_blank_lines_whitespace_and_repeats_are_dropped():
    data = b"  A dog barks. \r\n\r\n\t\na  DOG barks.\rA cat.\n A dog barks.\n"
    assert read_captions(data, "f") == ("A dog barks.", "A cat.")


def test_byte_order_mark_is_dropped():
    assert read_captions("\ufeffCafé at noon.\n".encode(), "f") == ("Café at noon.",)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_name_the_line(mark):
    with pytest.raises(UserError, match=r"f is not UTF-8 \(line 3: .*save it as UTF-8"):
        read_captions(mark + b"one\ntwo\n\xff caf\xe9\n", "f")


@pytest.mark.parametrize("data", [b"", b"\n \n\t\r\n", b"\xef\xbb\xbf"])
def test_file_without_captions(tmp_path, data):
    path = tmp_path / "empty.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match="has no captions"):
        load_captions("text_file", "small", path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no caption file at .*none\.txt; set dataset\.path"):
        load_captions("text_file", "small", tmp_path / "none.txt")


def test_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_captions("text_file", "small", tmp_path)


def test_too_few_captions_says_how_many_and_what_fits(caption_file):
    path = caption_file([*numbered(130), *numbered(130)])
    with pytest.raises(
        UserError, match=r"has 130 distinct captions.*large needs 512.*small or medium or 130, or a longer"
    ):
        load_captions("text_file", "large", path)


def test_too_few_captions_for_any_named_size(caption_file):
    with pytest.raises(UserError, match=r"use dataset\.size=3, or a longer list"):
        load_captions("text_file", "small", caption_file(numbered(3)))


def test_text_file_without_path():
    with pytest.raises(UserError, match=r"needs dataset\.path=FILE"):
        load_captions("text_file", "small")


def test_shipped_list_takes_no_path(caption_file):
    with pytest.raises(UserError, match="dataset=text_file"):
        load_captions("everyday", "small", caption_file(numbered(20)))


def test_coco_that_is_not_built_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m layerbits\.inputs\.coco.*dataset=text_file"):
        load_captions("coco2017", "small")


def test_coco_is_read_from_the_cache(tmp_path, monkeypatch, caption_file):
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path))
    caption_file(numbered(20), captions_module.COCO_FILE)
    assert load_captions("coco2017", "small").captions == tuple(numbered(16))


def test_cache_folder_is_under_the_home_unless_set(monkeypatch, tmp_path):
    monkeypatch.delenv("LAYERBITS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "layerbits"


# The config group


@pytest.mark.parametrize("name", ["everyday", "coco2017", "text_file"])
def test_every_dataset_config_names_itself_and_has_the_same_keys(name):
    config = yaml.safe_load((ROOT / "configs" / "dataset" / f"{name}.yaml").read_text())
    assert config["name"] == name
    assert list(config) == ["name", "size", "path", "packing"]
    assert (config["size"], config["packing"]) == ("small", "packed")


# Files of another kind

OTHERS = {
    "UTF-16": ("A cat sits.\n".encode("utf-16"), "is not UTF-8"),
    "UTF-16 without its mark": ("A cat sits.\n".encode("utf-16-le"), "is binary, or UTF-16 without its mark"),
    "Latin-1": ("Un café.\n".encode("latin-1"), r"is not UTF-8 \(line 1"),
    "gzip": (b"\x1f\x8b\x08\x00captions", "is not UTF-8"),
    "binary": (b"PAR1\x00\x00captions", "is binary"),
    "JSON lines": (b'{"caption": "A cat sits."}\n{"caption": "A dog runs."}\n', "is JSON, not text"),
    "JSON": (b'[\n "A cat sits.",\n "A dog runs."\n]\n', "is JSON, not text"),
    "JSON over several lines": (b'{\n "captions": ["A cat sits."]\n}\n', "looks like JSON"),
    "a web page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n", "is a web page"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "one endless line": (b"A cat sits. " * 10_000, "a line of 119,999 characters"),
    "nothing but blank lines": (b"\n \n\t\n", "has no captions"),
    "an empty file": (b"", "has no captions"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_refused_in_one_line(kind):
    data, line = OTHERS[kind]
    with pytest.raises(UserError, match=line) as error:
        read_captions(data, "captions.txt")
    assert "\n" not in str(error.value)


def test_captions_may_open_with_a_bracket():
    assert read_captions(b"[indoor] A cat sits.\n{sic} A dog runs.\n", "x") == (
        "[indoor] A cat sits.",
        "{sic} A dog runs.",
    )
