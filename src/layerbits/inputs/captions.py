"""Caption lists: what a model is calibrated on, and a held-out split that shares no line with it.

Calibration takes the first lines of a list, so that small ⊂ medium ⊂ large. The held-out lines come from behind
the largest calibration size; in a list too short for that they come from its end, and never from the lines that
the run itself calibrates on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.cache import cache_dir
from layerbits.errors import UserError
from layerbits.paths import home_path

if TYPE_CHECKING:
    from layerbits.inputs.pictures import Pictured

SIZES = {"small": 16, "medium": 128, "large": 512}
"""Number of calibration captions by name."""

HELD_OUT = 256
"""Held-out captions, at most."""

LONGEST = 100_000
"""Characters of a line that are no caption any more."""

NONE_HELD_OUT = (
    "the run calibrated on every caption of its list, so none is held out to measure on; add captions at the end of "
    "the list (scores stay good), or score with a smaller dataset.size"
)
"""What is said where a list has nothing left."""

_POINTER = "version https://git-lfs.github.com/spec"

COCO_FILE = "coco2017_captions.txt"
"""Name of the built COCO 2017 list in the cache folder."""


class Question(str):
    """A line of a task: a prompt with its right answer, which alone counts in the loss.

    Attributes:
        answer: Where the answer starts, in characters.
    """

    answer: int

    def __new__(cls, prompt: str, answer: str) -> Question:
        """Joins both as they are."""
        made = super().__new__(cls, prompt + answer)
        made.answer = len(prompt)
        return made


@dataclass(frozen=True)
class CaptionSet:
    """Captions of one run.

    Attributes:
        name: Dataset name.
        size: ``small``, ``medium``, ``large`` or a number as text.
        captions: Calibration captions, in order; chats about pictures (``Pictured``) in a dataset of those.
        held_out: Up to :data:`HELD_OUT` further captions, disjoint from ``captions`` up to case and spacing. Apart
            from every named size when the list has ``SIZES["large"] + HELD_OUT`` captions, otherwise the last ones
            that are left; empty when the list ends with ``captions``.
        digest: First 16 hex digits of the SHA-256 of ``captions`` joined by newlines; of pictures
            also over their pixels.
    """

    name: str
    size: str
    captions: tuple[Pictured | str, ...]
    held_out: tuple[Pictured | str, ...]
    digest: str


def load_captions(name: str, size: str, path: str | Path | None = None) -> CaptionSet:
    """Loads a caption list and splits it.

    Args:
        name: ``everyday`` (shipped), ``coco2017`` (built by ``python -m layerbits.inputs.coco``), ``task`` (questions,
            written by ``python -m layerbits.answers.rows``), ``text_file``, or any other name together with ``path``.
        size: A key of :data:`SIZES`, or a number of captions as text.
        path: Text file, one caption a line, in UTF-8 (:func:`read_captions`); of ``task`` :func:`read_questions`.

    Raises:
        UserError: Unknown dataset or size, no such file, an unusable file, or one with too few captions.
    """
    count = count_of(size)
    source, lines = _lines(name, path)
    if len(lines) < count:
        raise UserError(
            f"{source} has {len(lines)} distinct captions, dataset.size={size} needs {count}; {_fit(lines)}"
        )
    start = max(count, min(SIZES["large"], len(lines) - HELD_OUT))
    captions = lines[:count]
    named = [f"{c.answer}:{c}" if isinstance(c, Question) else c for c in captions]
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
    return CaptionSet(name, size, captions, lines[start : start + HELD_OUT], digest)


def read_captions(data: bytes, source: str) -> tuple[str, ...]:
    """Reads a caption file: one caption a line.

    Blank lines, surrounding whitespace and a byte order mark are dropped. A line that repeats an earlier one, up to
    case and spacing, is dropped too.

    Args:
        data: The file's bytes, UTF-8.
        source: How to name the file in an error.

    Raises:
        UserError: Not UTF-8, another kind of file, or no caption at all.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{source} is not UTF-8 (line {line}: {error.reason}); save it as UTF-8") from None
    if what := _other_kind(text):
        raise UserError(f"{source} {what}; give a text file with one caption a line")
    distinct: dict[str, str] = {}
    for line_text in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        distinct.setdefault(normalised(line_text), line_text.strip())
    distinct.pop("", None)
    if not distinct:
        raise UserError(f"{source} has no captions; give a text file with one caption a line")
    if (longest := max(map(len, distinct.values()))) > LONGEST:
        raise UserError(f"{source} has a line of {longest:,} characters, which is no caption; put one on each line")
    return tuple(distinct.values())


def read_questions(data: bytes, source: str) -> tuple[Question, ...]:
    """Reads a file of questions: a JSON object a line, with ``prompt`` and ``answer``.

    Args:
        data: The file's bytes, UTF-8.
        source: How to name the file in an error.

    Raises:
        UserError: A line is none, or says neither; or there is none at all.
    """
    questions: dict[str, Question] = {}
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            question = Question(str(one["prompt"]), str(one["answer"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{source} line {number} is no question; write {{"prompt": "...", "answer": "..."}} on each line, or '
                "make the file with `python -m layerbits.answers.rows`"
            ) from None
        if not one["prompt"] or not one["answer"]:
            raise UserError(f"{source} line {number} has an empty prompt or answer; leave it out")
        questions.setdefault(question, question)
    if not questions:
        raise UserError(f"{source} has no questions; make the file with `python -m layerbits.answers.rows`")
    return tuple(questions.values())


def _other_kind(text: str) -> str:
    """What a file is whose lines are no captions; empty where nothing says so."""
    start = text.lstrip()[:200].lower()
    if "\0" in text:
        return "is binary, or UTF-16 without its mark"
    if start.startswith(("<!doctype html", "<html")):
        return "is a web page, perhaps of a failed download"
    if start.startswith(_POINTER):
        return "is a pointer of Git LFS (run `git lfs pull`)"
    if start.startswith(("{", "[")):
        try:
            json.loads(text.strip().partition("\n")[0] if start.startswith("{") else text)
        except ValueError:
            return "looks like JSON" if start.startswith(('{"', "{\n", "[{", '["', "[\n")) else ""
        return "is JSON, not text"
    return ""


def normalised(caption: str) -> str:
    """A caption with case folded and runs of whitespace as one space: equal for lines that count as one."""
    return " ".join(caption.casefold().split())


def count_of(size: str) -> int:
    """Number of captions that a size means.

    Raises:
        UserError: It means none.
    """
    if size in SIZES:
        return SIZES[size]
    if size.isascii() and size.isdigit() and int(size) > 0:
        return int(size)
    raise UserError(f"dataset.size={size} is not known; use {', '.join(SIZES)} or a number of captions")


def _lines(name: str, path: str | Path | None) -> tuple[str, tuple[str, ...]]:
    if name == "everyday":
        if path is not None:
            raise UserError("dataset=everyday is the shipped list; for a list of your own use dataset=text_file")
        data = resources.files("layerbits").joinpath("data/everyday_captions.txt").read_bytes()
        return "the everyday list", read_captions(data, "the everyday list")
    if path is None:
        if name != "coco2017":
            raise UserError(f"dataset={name} needs dataset.path=FILE, a text file with one caption a line")
        path = cache_dir() / COCO_FILE
        if not path.exists():
            raise UserError(
                f"the COCO 2017 captions are not built yet (no {path}); run `python -m layerbits.inputs.coco`, "
                "or use dataset=text_file dataset.path=FILE"
            )
    path = home_path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no caption file at {path}; set dataset.path to a text file, one caption a line") from None
    except IsADirectoryError:
        raise UserError(f"dataset.path={path} is a folder; give a text file, one caption a line") from None
    except OSError as error:
        raise UserError(f"cannot read the captions in {path} ({error.strerror}); give a readable text file") from None
    return str(path), read_questions(data, str(path)) if name == "task" else read_captions(data, str(path))


def _fit(lines: Sequence[str]) -> str:
    fitting = [name for name, count in SIZES.items() if count <= len(lines)]
    return f"use dataset.size={' or '.join([*fitting, str(len(lines))])}, or a longer list"
