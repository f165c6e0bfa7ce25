"""What a probe is measured on, and where each text is from: what a run held out, or files of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from layerbits.errors import UserError
from layerbits.inputs.captions import CaptionSet, normalised, read_captions
from layerbits.inputs.datasets import WITH_PICTURES, held_out_captions
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


def read_texts(paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Text files of one's own, one text a line: name of the source → its texts.

    Raises:
        UserError: A file cannot be read, or two have one name.
    """
    read: dict[str, tuple[str, ...]] = {}
    for path in paths:
        file = user_path(path)
        try:
            lines = read_captions(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"cannot read the texts in {file} ({error.strerror}); give a text file") from None
        if file.stem in read:
            raise UserError(f"two files of texts are called {file.stem}; rename one, they are told apart by it")
        read[file.stem] = lines
    return read


def probe_texts(captions: CaptionSet, own: Mapping[str, Sequence[str]] | None = None) -> ProbeTexts:
    """What a scheme can be probed on.

    Args:
        captions: Of the run that scored.
        own: Of :func:`read_texts`; none = what the run held out. Sources take turns, and texts that the run
            calibrated on are left out.

    Raises:
        UserError: All texts of a source were calibrated on.
    """
    if not own:
        plain = captions.name if captions.name not in WITH_PICTURES else "everyday"
        sources = tuple(PICTURES if isinstance(one, Pictured) else plain for one in captions.held_out)
        return ProbeTexts(captions.name, captions.held_out, sources)
    known = {normalised(one) for one in captions.captions if isinstance(one, str)}
    parts: dict[str, list[str]] = {}
    for name, lines in own.items():
        parts[name] = [line for line in lines if normalised(line) not in known]
        if not parts[name]:
            raise UserError(f"every text of {name} was calibrated on; give other texts")
    turns = [
        (text, name)
        for row in zip_longest(*parts.values())
        for text, name in zip(row, parts, strict=True)
        if text is not None
    ]
    return ProbeTexts(",".join(parts), tuple(t for t, _ in turns), tuple(s for _, s in turns), own=True)
