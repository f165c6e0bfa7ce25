"""What a probe is measured on, and where each text is from: what a run held out, or files of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from layerbits.errors import UserError
from layerbits.inputs.captions import CaptionSet, normalised, read_captions
from layerbits.inputs.datasets import held_out_captions
from layerbits.inputs.pictures import Pictured
from layerbits.paths import user_path

PICTURES = "pictures"
"""Source of all words after pictures."""


@dataclass(frozen=True)
class ProbeTexts:
    """Texts that no scheme was calibrated on.

    Attributes:
        name: Of all of them, for the record.
        texts: Captions, or chats about pictures.
        own: Whether they are from files of one's own.
    """

    name: str
    texts: tuple[Pictured | str, ...]
    sources: tuple[str, ...]
    own: bool = False

    def in_rows(self, rows: int) -> tuple[str, ...]:
        """Source of each caption by its number in the rows of :func:`layerbits.probing.probe.held_out_rows`."""
        shown = [s for t, s in zip(self.texts, self.sources, strict=True) if isinstance(t, Pictured)][:rows]
        if not shown:
            return self.sources
        plain = [s for t, s in zip(self.texts, self.sources, strict=True) if isinstance(t, str)]
        return (*shown, *(plain or ["everyday"] * len(held_out_captions(self.texts))))


def probe_texts(captions: CaptionSet, paths: Sequence[str] = ()) -> ProbeTexts:
    """What a scheme can be probed on.

    Args:
        captions: Of the run that scored.
        paths: Text files, one text a line, each a source; none = what the run held out. Files take turns, and lines
            that the run calibrated on are left out.

    Raises:
        UserError: A file cannot be read, two have one name, or all lines of one were calibrated on.
    """
    if not paths:
        plain = captions.name if captions.name not in ("image_text", "mixed") else "everyday"
        sources = tuple(PICTURES if isinstance(one, Pictured) else plain for one in captions.held_out)
        return ProbeTexts(captions.name, captions.held_out, sources)
    known = {normalised(one) for one in captions.captions if isinstance(one, str)}
    parts: dict[str, list[str]] = {}
    for path in paths:
        file = user_path(path)
        try:
            lines = read_captions(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"cannot read the texts in {file} ({error.strerror}); give a text file") from None
        if file.stem in parts:
            raise UserError(f"two files of texts are called {file.stem}; rename one, they are told apart by it")
        parts[file.stem] = [line for line in lines if normalised(line) not in known]
        if not parts[file.stem]:
            raise UserError(f"every line of {file} was calibrated on; give other texts")
    turns = [
        (text, name)
        for row in zip_longest(*parts.values())
        for text, name in zip(row, parts, strict=True)
        if text is not None
    ]
    return ProbeTexts(",".join(parts), tuple(t for t, _ in turns), tuple(s for _, s in turns), own=True)
