"""Pictures with words: a chat about one or more pictures, read from files, checked, and told apart by their pixels.

Sources: a JSONL file (``{"image": PATH, "text": …}`` or chat ``messages``), a folder of pairs (``x.jpg`` beside
``x.txt``), COCO's annotation file beside its images, and the embedded list (:mod:`layerbits.inputs.drawn`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError, first_line
from layerbits.inputs.files import few
from layerbits.paths import home_path
from layerbits.plain import JsonMapping, JsonObject

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe the picture."
"""What a picture with nothing but a caption is asked; the caption is the answer."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_WITH_COPIES = ("MPO",)
"""Formats whose further frames are not more of the same film: a phone's JPEG with its depth map or its other lens."""
LEAST_SIDE = 4
"""Pixels of the shorter side; below that a picture shows nothing."""
_MOST_PIXELS = 100_000_000
"""Up to which a picture may be enlarged: 300 MB in RGB."""
_LONGEST_PATH = 1000
"""Characters; what is longer is a picture in base64."""

_IMAGE_PART = '{"type": "image", "image": PATH}'

Message = JsonMapping
"""``role`` and ``content``, a list of parts: ``{"type": "image"}`` or ``{"type": "text", "text": …}``."""


@dataclass(frozen=True)
class Picture:
    """A picture that is read when it is needed.

    Attributes:
        where: File, and line or row of the list that names it, for errors.
        read: Makes it, as it is in the file.
        file: The file, where it is one of a user's list.
    """

    where: str
    read: Callable[[], Image.Image] = field(compare=False)
    file: Path | None = None

    def check(self) -> None:
        """Looks for the file, which is not opened.

        Raises:
            UserError: There is none.
        """
        if self.file is None:
            return
        try:
            self.file.stat()
        except FileNotFoundError:
            raise self._gone() from None
        except (OSError, ValueError):  # why it cannot be read is found out where it is
            return

    def _gone(self) -> UserError:
        return UserError(f"{self.where}: there is no such file; correct the path")

    def pixels(self) -> Image.Image:
        """The picture in RGB, turned as its EXIF mark says; what is transparent becomes white.

        Raises:
            UserError: It is missing, damaged, animated, too narrow, or of a kind without colours as they are seen.
        """
        from PIL import Image, ImageOps

        try:
            with warnings.catch_warnings():  # a picture this large may still be reduced by dataset.max_pixels
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = self.read()
            frames = 1 if image.format in _WITH_COPIES else getattr(image, "n_frames", 1)
            if frames > 1:
                raise UserError(f"{self.where} is animated or has pages ({frames} frames); give a still picture")
            image.load()
            image = ImageOps.exif_transpose(image)
        except UserError:
            raise
        except FileNotFoundError:
            raise self._gone() from None
        except Image.DecompressionBombError:
            most = 2 * int(Image.MAX_IMAGE_PIXELS or 0)  # where Pillow's warning becomes an error
            raise UserError(f"{self.where} has more than {most:,} pixels; save it smaller") from None
        except Exception as error:  # decoders raise whatever a damaged file makes of them
            why = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{self.where} is no picture that can be read ({why}); replace it") from None
        if image.mode == "CMYK":
            raise UserError(f"{self.where} is in CMYK, colours for printing; save it in RGB")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise UserError(f"{self.where} has more than 8 bits a colour ({image.mode}); save it in RGB")
        if min(image.size) < LEAST_SIDE:
            raise UserError(f"{self.where} is {image.width}×{image.height} pixels, which shows nothing; leave it out")
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


@dataclass(frozen=True)
class Pictured:
    """A chat about pictures.

    Attributes:
        messages: Its turns.
        pictures: One for each part of type ``image``, in order.
        where: File and row, for errors.
    """

    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    where: str

    @classmethod
    def of_caption(cls, picture: Picture, text: str) -> Pictured:
        """A picture and its caption, as question and answer."""
        asked = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        answer = [{"type": "text", "text": text}]
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
        return cls(turns, (picture,), picture.where)

    @property
    def texts(self) -> list[str]:
        """Its words, part by part."""
        return [part["text"] for turn in self.messages for part in turn["content"] if part["type"] == "text"]

    @property
    def name(self) -> str:
        """Row and files, for errors that may be of any of its pictures."""
        files = [str(picture.file) for picture in self.pictures if picture.where != self.where and picture.file]
        return f"{self.where} ({few(files)})" if files else self.where

    def digest(self) -> str:
        """Of its words and pixels.

        Raises:
            UserError: As :meth:`Picture.pixels`.
        """
        digest = hashlib.sha256(json.dumps([dict(turn) for turn in self.messages], sort_keys=True).encode())
        for picture in self.pictures:
            image = picture.pixels()
            digest.update(f"{image.width}x{image.height}".encode() + image.tobytes())
        return digest.hexdigest()


def check_pixels(least: int | None, most: int | None) -> None:
    """Checks the limits that pictures are resized to, in pixels.

    Raises:
        UserError: No picture lies between them.
    """
    if not 1 <= (1 if least is None else least) <= min(_MOST_PIXELS, _MOST_PIXELS if most is None else most):
        raise UserError(
            f"dataset.min_pixels={least} and dataset.max_pixels={most} leave no picture; give numbers from 1 to "
            f"{_MOST_PIXELS:,}, and min_pixels not above max_pixels"
        )


def read_pictures(path: Path) -> tuple[Pictured, ...]:
    """Reads a list of pictures with words.

    Args:
        path: A JSONL file, COCO's annotation file, or a folder of pairs.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    if path.is_dir():
        return _of_folder(path)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no {path}; set dataset.path to a list or folder of pictures") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); give a JSONL file in UTF-8") from None
    if not text.strip():
        raise UserError(f'{path} is empty; give a line {{"image": PATH, "text": CAPTION}} per picture')
    if '"annotations"' in text:
        with suppress(ValueError, RecursionError):
            whole = json.loads(text)
            if isinstance(whole, dict) and "annotations" in whole:
                return _of_coco(whole, path)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return tuple(_of_line(_parsed(line, f"{path} row {n}"), path, n) for n, line in lines)


def _of_line(value: object, path: Path, number: int) -> Pictured:
    where = f"{path} row {number}"
    if not isinstance(value, dict):
        raise UserError(f'{where} is no object; give {{"image": PATH, "text": CAPTION}}')
    if "messages" in value:
        return _of_messages(value, path, where)
    image, text = value.get("image"), value.get("text", value.get("caption"))
    if not isinstance(image, str) or not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} lacks an image or its text; give {{"image": PATH, "text": CAPTION}}')
    return Pictured.of_caption(_file(path.parent, image, where), text.strip())


def _of_messages(value: JsonObject, path: Path, where: str) -> Pictured:
    pictures: list[Picture] = []
    turns: list[Message] = []
    try:
        said = value.get("images") or []
        named = [_text(name) for name in ([said] if isinstance(said, str) else list(said))]
        for turn in value["messages"]:
            parts = turn["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            content = []
            for part in parts:
                if part["type"] == "image":
                    file = part.get("image") or part.get("path") or part.get("url") or named.pop(0)
                    pictures.append(_file(path.parent, _text(file), where))
                    content.append({"type": "image"})
                elif part["type"] == "text":
                    content.append({"type": "text", "text": _text(part["text"])})
                else:
                    raise UserError(
                        f"{where} has a part of type {part['type']}; give images as {_IMAGE_PART} and texts"
                    )
            turns.append({"role": str(turn["role"]), "content": content})
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(
            f"{where} holds no chat that can be read; give messages with role and content, each text and the path of "
            "each image a string"
        ) from None
    if named:
        raise UserError(f"{where} names {named[0]}, which no part of type image of its messages shows; add one")
    if not pictures:
        raise UserError(f"{where} has no picture; use dataset=text_file for text")
    return Pictured(tuple(turns), tuple(pictures), where)


def _of_folder(folder: Path) -> tuple[Pictured, ...]:
    rows: list[Pictured] = []
    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES):
        words = file.with_suffix(".txt")
        if not words.is_file():
            raise UserError(f"{file} has no {words.name} beside it; write its caption there, or take the picture away")
        try:
            text = words.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {words} ({first_line(error)}); save it as text in UTF-8") from None
        if not text:
            raise UserError(f"{words} is empty; write the caption of {file.name} there")
        rows.append(Pictured.of_caption(_picture(file, f"{folder} row {len(rows) + 1}"), text))
    if not rows:
        raise UserError(f"{folder} has no pictures ({', '.join(SUFFIXES[:4])}, …); give a folder of pairs x.jpg, x.txt")
    return tuple(rows)


def _of_coco(whole: JsonObject, path: Path) -> tuple[Pictured, ...]:
    """One caption per image, the first in the file's order that says something."""
    captions: dict[str, str] = {}
    try:
        files = {image["id"]: _text(image["file_name"]) for image in whole["images"]}
        notes = [(note["image_id"], _text(note["caption"]).strip()) for note in whole["annotations"]]
    except (KeyError, TypeError):
        raise UserError(f"{path} is not COCO's annotation file of captions; give captions_train2017.json") from None
    for n, (image, caption) in enumerate(notes, start=1):
        if image not in files:
            raise UserError(f"{path} row {n} of its annotations is of image {image}, which its images lack; add it")
        if caption:
            captions.setdefault(files[image], caption)
    if not captions:
        raise UserError(f"{path} has no captions; give captions_train2017.json")
    first = next(iter(captions))
    beside = [path.parent, *sorted(d for d in (*path.parent.iterdir(), *path.parent.parent.iterdir()) if d.is_dir())]
    folder = next((d for d in beside if (d / first).is_file()), None)
    if folder is None:
        raise UserError(f"the images of {path} are not beside it ({first} in a folder there); unpack them there")
    named = enumerate(captions.items(), start=1)
    return tuple(Pictured.of_caption(_file(folder, file, f"{path} row {n}"), text) for n, (file, text) in named)


def _file(folder: Path, name: str, where: str) -> Picture:
    name = name.removeprefix("file://")
    if "://" in name:
        raise UserError(f"{where} names {name}; fetch it, and give a file on this machine")
    if name.startswith("data:") or len(name) > _LONGEST_PATH:
        raise UserError(f"{where} holds a picture itself ({name[:20]}…); save it as a file, and give its path")
    try:
        path = home_path(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return _picture(path if path.is_absolute() else folder / path, where)


def _picture(path: Path, where: str) -> Picture:
    return Picture(f"{path} ({where})", partial(_open, path), path)


def _open(path: Path) -> Image.Image:
    from PIL import Image

    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise OSError("a folder, a pipe or a device, not a file")
    return Image.open(path)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({first_line(error)}); give one object a line") from None


def distinct(rows: Sequence[Pictured]) -> tuple[Pictured, ...]:
    """Without the rows that say the same about the same files as an earlier one."""
    kept: dict[object, Pictured] = {}
    for row in rows:
        said = json.dumps([dict(turn) for turn in row.messages], sort_keys=True)
        kept.setdefault((said, *(picture.file or picture.where for picture in row.pictures)), row)
    return tuple(kept.values())


def digest_of_all(rows: Sequence[Pictured | str]) -> str:
    """First 16 hex digits of the SHA-256 over words and pixels of all rows, in order.

    Raises:
        UserError: As :meth:`Picture.pixels`.
    """
    parts = (row if isinstance(row, str) else row.digest() for row in rows)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
