"""Parts of a model card that are written again when something is measured later; all else in the file stays."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from layerbits.atomic import atomic
from layerbits.errors import first_line

CARD = "README.md"


def part(name: str, lines: Sequence[str] = ()) -> list[str]:
    """Lines of a card with the marks around them, which a reader of the page does not see.

    Args:
        name: Of the part.
        lines: What is between the marks; a part without any waits for what is measured later.
    """
    return [_begin(name), *(["", *lines, ""] if lines else []), _end(name)]


def rewrite_part(folder: Path, name: str, make: Callable[[list[str]], list[str]]) -> Path | None:
    """Writes a part of a checkpoint's model card again; the file is seen whole at every moment.

    A folder without a card is left alone. A ``README.md`` without the part's marks, and one that cannot be written,
    stay as they are, and a warning says so.

    Args:
        folder: The checkpoint.
        name: Of the part.
        make: Makes its lines of those that it has.

    Returns:
        The card; ``None`` where it has no such part, or could not be written.
    """
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        text = card.read_bytes().decode("utf-8", errors="surrogateescape")
        pattern = f"{re.escape(_begin(name))}(.*?){re.escape(_end(name))}"
        match = re.search(pattern, text, flags=re.DOTALL)
        if match is None:
            _warn(f"{card} stays as it is: it has no part between `{_begin(name)}` and `{_end(name)}`")
            return None
        new = "\n".join(part(name, make(match[1].strip().splitlines())))
        if new == match[0]:
            return card
        with atomic(card) as file:
            file.write((text[: match.start()] + new + text[match.end() :]).encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        _warn(f"{card} stays as it is: it cannot be written ({error.strerror or first_line(error)})")
        return None
    return card


def _begin(name: str) -> str:
    return f"<!-- layerbits: {name} -->"


def _end(name: str) -> str:
    return f"<!-- layerbits: end of {name} -->"


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr, flush=True)
