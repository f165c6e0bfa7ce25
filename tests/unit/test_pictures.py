"""Lists of pictures and what is wrong with pictures: one line each, with the file and the row."""

import json
import os

import pytest
from PIL import Image

from layerbits.errors import UserError
from layerbits.inputs.captions import HELD_OUT, SIZES
from layerbits.inputs.datasets import load_dataset
from layerbits.inputs.drawn import embedded
from layerbits.inputs.pictures import Picture, Pictured, check_pixels, digest_of_all, read_pictures


def saved(path, mode="RGB", size=(32, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100 if mode in ("L", "I;16") else None).save(path, **options)
    return path


def without_size(path):
    """A TIFF without its tag of the width: Pillow raises a TypeError."""
    saved(path)
    tag = (256).to_bytes(2, "little") + (4).to_bytes(2, "little")
    data = path.read_bytes()
    assert data.count(tag) == 1
    path.write_bytes(data.replace(tag, (40_000).to_bytes(2, "little") + tag[2:]))


def lines(folder, *rows):
    file = folder / "list.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


def pixels(folder, name):
    (row,) = read_pictures(lines(folder, {"image": name, "text": "words"}))
    return row.pictures[0].pixels()


def test_a_list_of_pairs_is_read_in_order(tmp_path):
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.png", size=(8, 9))
    rows = read_pictures(lines(tmp_path, {"image": "a.png", "text": "one"}, {"image": "b.png", "caption": "two"}))
    assert [row.texts[-1] for row in rows] == ["one", "two"]
    assert rows[1].pictures[0].pixels().size == (8, 9)


def test_chat_messages_keep_their_turns_and_pictures(tmp_path):
    saved(tmp_path / "a.png")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A grey field."}]
    (row,) = read_pictures(lines(tmp_path, {"messages": turns, "images": ["a.png"]}))
    assert row.texts == ["What is it?", "A grey field."]
    assert [turn["role"] for turn in row.messages] == ["user", "assistant"]
    assert row.pictures[0].pixels().size == (32, 24)


def test_a_folder_of_pairs_is_read_by_name(tmp_path):
    for name in ("b", "a"):
        saved(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(f"about {name}\n")
    assert [row.texts[-1] for row in read_pictures(tmp_path)] == ["about a", "about b"]


def test_coco_gives_the_first_caption_of_each_image(tmp_path):
    saved(tmp_path / "train2017" / "000001.jpg")
    notes = tmp_path / "annotations" / "captions_train2017.json"
    notes.parent.mkdir()
    notes.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "000001.jpg"}],
                "annotations": [{"image_id": 7, "caption": "First. "}, {"image_id": 7, "caption": "Second."}],
            }
        )
    )
    (row,) = read_pictures(notes)
    assert row.texts[-1] == "First."
    assert row.pictures[0].pixels().size == (32, 24)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png"}, "row 1 lacks an image or its text"),
        ({"image": "http://somewhere/a.png", "text": "x"}, "fetch it"),
        (
            {"image": "data:image/png;base64," + "A" * 9999, "text": "x"},
            r"row 1 holds a picture itself \(data:image/png;bas",
        ),
        ({"messages": [{"role": "user", "content": "hello"}]}, "row 1 has no picture"),
        ({"messages": [{"role": "user", "content": "hello"}], "images": None}, "row 1 has no picture"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
            'part of type image_url; give images as {"type": "image", "image": PATH}',
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part of type video"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "row 1 holds no chat"),
        ({"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]}, "no part of type image"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": 5}, "row 1 holds no chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": {"path": "a.png"}}]}]}, "holds no chat"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": None}]}],
                "images": ["a.png"],
            },
            "row 1 holds no chat",
        ),
        ({"image": "iVBORw0KGgo" + "A" * 9999, "text": "x"}, r"row 1 holds a picture itself \(iVBORw0KGgoAAAAAAAAA…"),
        ({"image": "~nobody-of-this-name/a.png", "text": "x"}, "row 1: .* needs a home directory"),
        (["a.png"], "row 1 is no object"),
    ],
)
def test_a_bad_row_is_told_with_its_number(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        read_pictures(lines(tmp_path, row))


@pytest.mark.parametrize(("line", "said"), [("{oops", "row 3 is not JSON"), ("[" * 100_000, "row 3 is not JSON")])
def test_a_row_is_a_line_of_the_file(tmp_path, line, said):
    file = lines(tmp_path, {"image": "a.png", "text": "one"})
    file.write_text(file.read_text() + f"\n{line}\n")
    with pytest.raises(UserError, match=said) as caught:
        read_pictures(file)
    assert "\n" not in str(caught.value)


def test_a_list_of_lines_may_be_called_json(tmp_path):
    saved(tmp_path / "a.png")
    file = lines(tmp_path, *({"image": "a.png", "text": text} for text in ("one", "two")))
    assert len(read_pictures(file.rename(tmp_path / "list.json"))) == 2


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ([{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "x"}], "row 2 of its annotations is of image 2"),
        ([{"image_id": 1, "caption": None}], "not COCO's annotation file"),
        ([{"image_id": 1, "caption": " "}], "has no captions"),
    ],
)
def test_a_bad_annotation_of_coco_is_told(tmp_path, annotations, said):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": annotations}))
    with pytest.raises(UserError, match=said):
        read_pictures(file)


def test_a_caption_in_another_encoding_is_told(tmp_path):
    saved(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*a\.txt \(.*\); save it as text in UTF-8"):
        read_pictures(tmp_path)


def test_names_in_a_folder_are_no_addresses(tmp_path):
    for name in ("~a", "data:b"):
        saved(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("words")
    assert [row.pictures[0].pixels().size for row in read_pictures(tmp_path)] == [(32, 24)] * 2


def test_a_row_that_comes_twice_counts_once(tmp_path):
    saved(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": text} for text in ("one", "two", "one", "three")]
    found = load_dataset("image_text", "2", lines(tmp_path, *rows))
    assert [row.texts[-1] for row in found.captions] == ["one", "two"]
    assert [row.texts[-1] for row in found.held_out] == ["three"]


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("gone.png", lambda _f: None, "no such file"),
        ("cut.jpg", lambda f: f.write_bytes(saved(f).read_bytes()[:300]), "no picture that can be read"),
        ("words.png", lambda f: f.write_text("hello"), "no picture that can be read"),
        ("print.jpg", lambda f: saved(f, "CMYK"), "CMYK"),
        ("thin.png", lambda f: saved(f, size=(1, 50)), "1×50 pixels"),
        ("empty.png", lambda f: f.write_bytes(b""), "no picture that can be read"),
        ("folder.png", lambda f: f.mkdir(), r"\(a folder, a pipe or a device, not a file\)"),
        ("pipe.png", os.mkfifo, r"\(a folder, a pipe or a device, not a file\)"),
        ("loop.png", lambda f: f.symlink_to(f), "no picture that can be read"),
        ("other.tif", without_size, "no picture that can be read"),
        ("deep.png", lambda f: saved(f, "I;16"), "more than 8 bits"),
        (
            "moves.gif",
            lambda f: Image.new("RGB", (9, 9)).save(f, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
            "animated",
        ),
        (
            "pages.tif",
            lambda f: Image.new("RGB", (9, 9)).save(f, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
            r"has pages \(2 frames\)",
        ),
    ],
)
def test_a_bad_picture_is_told_with_file_and_row(tmp_path, name, make, said):
    make(tmp_path / name)
    with pytest.raises(UserError, match=said) as caught:
        pixels(tmp_path, name)
    assert name in str(caught.value)
    assert "row 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_phones_picture_with_a_depth_map_is_the_picture(tmp_path):
    first, depth = Image.new("RGB", (32, 24), "red"), Image.new("RGB", (16, 12))
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[depth])
    with Image.open(tmp_path / "phone.jpg") as found:
        assert found.n_frames == 2
    assert pixels(tmp_path, "phone.jpg").size == (32, 24)


@pytest.mark.parametrize(("least", "most"), [(5, 4), (None, 0), (0, None), (10**12, None)])
def test_numbers_of_pixels_that_leave_no_picture_are_told(least, most):
    with pytest.raises(UserError, match=f"min_pixels={least} and dataset.max_pixels={most} leave no picture"):
        check_pixels(least, most)


def test_a_picture_with_very_many_pixels_is_read_or_refused_in_one_line(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    saved(tmp_path / "large.png", size=(30, 30))
    assert pixels(tmp_path, "large.png").size == (30, 30)
    assert not recwarn.list
    saved(tmp_path / "larger.png", size=(40, 30))
    with pytest.raises(UserError, match=r"larger.png \(.* row 1\) has more than 1,000 pixels; save it smaller"):
        pixels(tmp_path, "larger.png")


def test_a_path_may_be_written_as_an_address_of_a_file(tmp_path):
    saved(tmp_path / "a.png")
    assert pixels(tmp_path, f"file://{tmp_path}/a.png").size == (32, 24)


def test_one_picture_of_a_chat_may_be_named_without_a_list(tmp_path):
    saved(tmp_path / "a.png")
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Grey."}]
    (row,) = read_pictures(lines(tmp_path, {"messages": turns, "images": "a.png"}))
    assert row.pictures[0].pixels().size == (32, 24)


def test_a_picture_is_turned_as_its_mark_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "turned.jpg", size=(40, 20), exif=exif)
    assert pixels(tmp_path, "turned.jpg").size == (20, 40)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert pixels(tmp_path, "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_the_embedded_list_begins_with_the_shorter_one():
    few, many = embedded(8), embedded(20)
    assert [row.texts for row in few] == [row.texts for row in many[:8]]
    assert [row.digest() for row in few] == [row.digest() for row in embedded(8)]
    assert len({row.texts[-1] for row in embedded(64)}) == 64


def test_no_embedded_picture_is_calibrated_on_and_held_out():
    found = load_dataset("image_text", "130")
    large = SIZES["large"] + HELD_OUT
    assert len({row.texts[-1] for row in embedded(large)}) < large  # so it matters
    assert [row.texts for row in found.captions] == [row.texts for row in embedded(130)]
    rows = (*found.captions, *found.held_out)
    assert len({row.texts[-1] for row in rows}) == len(rows) == 130 + HELD_OUT


def test_a_digest_sees_words_and_pixels():
    def row(colour, text):
        return Pictured.of_caption(Picture("x", lambda: Image.new("RGB", (8, 8), colour)), text)

    digests = {digest_of_all([row("red", "a")]), digest_of_all([row("blue", "a")]), digest_of_all([row("red", "b")])}
    assert len(digests) == 3


def test_mixed_data_has_the_stated_share_and_begins_with_the_smaller_one():
    small, large = load_dataset("mixed", "8", share=0.25), load_dataset("mixed", "16", share=0.25)
    assert sum(isinstance(c, Pictured) for c in large.captions) == 4
    assert [getattr(c, "texts", c) for c in small.captions] == [getattr(c, "texts", c) for c in large.captions[:8]]
    assert {type(c).__name__ for c in large.held_out} == {"Pictured", "str"}


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_a_share_that_leaves_no_picture_or_no_caption_is_refused(share):
    with pytest.raises(UserError, match="share"):
        load_dataset("mixed", "8", share=share)


def test_a_list_that_is_too_short_is_told(tmp_path):
    saved(tmp_path / "a.png")
    file = lines(tmp_path, {"image": "a.png", "text": "one"})
    with pytest.raises(UserError, match="has 1 distinct rows with pictures"):
        load_dataset("image_text", "small", file)
