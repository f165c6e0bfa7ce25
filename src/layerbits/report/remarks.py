"""What was found of schemes later, at the end of a description of the run that made them."""

from __future__ import annotations

from collections.abc import Mapping

REMARK = "\nAnswers"
"""Where the description of a run begins that an evaluation wrote into it; all behind it is replaced."""

_NOTE_SIZE = 8000  # MLflow's limit of a tag, in characters


def with_remarks(note: str, said: Mapping[str, str]) -> str:
    """A description with what was found of its schemes at its end; what it had there for others of them stays.

    Args:
        note: The description.
        said: Name of a scheme → a line; nothing changes without any.
    """
    if not said:
        return note
    body, _, old = note.partition(REMARK)
    kept = dict(line.removeprefix("- ").split(": ", 1) for line in old.splitlines() if line.startswith("- "))
    lines = "".join(f"- {name}: {words}\n" for name, words in {**kept, **said}.items())
    added = f"{REMARK} (latest evaluation):\n\n{lines}"[:_NOTE_SIZE]
    room = _NOTE_SIZE - len(added)
    whole = f"{body.rstrip()}\n"
    if len(whole) > room:
        whole = whole[:room].rpartition("\n")[0] + "\n"
    return whole + added
