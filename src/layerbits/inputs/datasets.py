"""Calibration data by name: captions, pictures with words, or both in a stated share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerbits.errors import UserError
from layerbits.inputs.captions import HELD_OUT, SIZES, CaptionSet, count_of, load_captions
from layerbits.inputs.drawn import embedded
from layerbits.inputs.pictures import Pictured, digest_of_all, distinct, read_pictures
from layerbits.paths import home_path

PICTURES, MIXED = WITH_PICTURES = "image_text", "mixed"
SHARE = 0.5
"""Share of pictures in ``mixed`` where nothing is said."""


def load_dataset(name: str, size: str, path: str | Path | None = None, share: float | None = None) -> CaptionSet:
    """Loads what a run calibrates on, and what it holds out.

    Args:
        name: ``image_text`` (pictures with words; embedded ones without a path), ``mixed`` (these and the everyday
            captions), or a dataset of :func:`layerbits.inputs.captions.load_captions`.
        size: A key of ``SIZES``, or a number as text.
        path: Of the captions or the list of pictures.
        share: Share of pictures in ``mixed``.

    Raises:
        UserError: As :func:`load_captions`, or a picture cannot be used.
    """
    if name not in WITH_PICTURES:
        return load_captions(name, size, path)
    rows, held_out = _chosen(name, size, path, share)
    return CaptionSet(name, size, rows, held_out, digest_of_all(rows))


def check_dataset(name: str, size: str, path: str | Path | None = None, share: float | None = None) -> None:
    """Checks what :func:`load_dataset` reads; no picture is opened.

    Raises:
        UserError: As :func:`load_captions`, or a list of pictures or a file that it names is not there.
    """
    if name not in WITH_PICTURES:
        load_captions(name, size, path)
        return
    for row in _chosen(name, size, path, share)[0]:
        if isinstance(row, Pictured):
            for picture in row.pictures:
                picture.check()


_Rows = tuple[Pictured | str, ...]


def _chosen(name: str, size: str, path: str | Path | None, share: float | None) -> tuple[_Rows, _Rows]:
    """What a run with pictures calibrates on, and what it holds out."""
    count = count_of(size)
    if name == PICTURES:
        return _pictures(count, size, path)
    share = SHARE if share is None else share
    if not 0 < share < 1:
        raise UserError(f"dataset.share={share:g} is no share of pictures; give a number between 0 and 1")
    order = [int((i + 1) * share) > int(i * share) for i in range(count)]  # true: a picture
    if not any(order) or all(order):
        raise UserError(f"dataset.share={share:g} of {count} leaves no picture or no caption; raise dataset.size")
    pictures, shown = _pictures(sum(order), size, path)
    texts = load_captions("everyday", str(count - sum(order)))
    parts = iter(pictures), iter(texts.captions)
    mixed = tuple(next(parts[0]) if picture else next(parts[1]) for picture in order)
    return mixed, tuple(row for pair in zip(shown, texts.held_out, strict=False) for row in pair)


def has_pictures(captions: Sequence[Pictured | str]) -> bool:
    """Whether some of it are pictures."""
    return any(isinstance(caption, Pictured) for caption in captions)


def held_out_captions(captions: Sequence[Pictured | str]) -> tuple[str, ...]:
    """The captions among what is held out; of a dataset of pictures alone, those of the everyday list."""
    texts = _texts(captions)
    return _texts(load_captions("everyday", "large").held_out) if captions and not texts else texts


def _texts(captions: Sequence[Pictured | str]) -> tuple[str, ...]:
    return tuple(caption for caption in captions if isinstance(caption, str))


def _pictures(count: int, size: str, path: str | Path | None) -> tuple[tuple[Pictured, ...], tuple[Pictured, ...]]:
    """The first pictures, and those that are held out."""
    most = max(count, SIZES["large"]) + HELD_OUT
    rows = _embedded(most) if path is None else distinct(read_pictures(home_path(path)))
    if len(rows) < count:
        raise UserError(
            f"{path} has {len(rows)} distinct rows with pictures, dataset.size={size} needs {count}; give a longer "
            "list or a smaller size"
        )
    start = max(count, min(SIZES["large"], len(rows) - HELD_OUT))
    return rows[:count], rows[start : start + HELD_OUT]


def _embedded(count: int) -> tuple[Pictured, ...]:
    """The first embedded pictures with captions of their own: some drawings come again further down."""
    rows: dict[str, Pictured] = {}
    drawn = count
    while len(rows) < count:
        for row in embedded(drawn):
            rows.setdefault(row.texts[-1], row)
        drawn += count
    return tuple(rows.values())[:count]
