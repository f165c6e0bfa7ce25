"""What a vLLM made of exports when it was asked: figures of ``benchmarks/layouts.py``, for ``docs/export.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerbits.checkpoint.label import Label

DATA = Path(__file__).with_name("served.json")

_LONGEST = 160
"""Characters of a runtime's words in a table."""


@dataclass(frozen=True)
class Answer:
    """Whether a runtime serves a layout.

    Attributes:
        loads: It loads it and tells log-probabilities.
        words: Its own, where it does not.
        plugin: Only with the operators of the tests' plugin.
    """

    loads: bool
    words: str = ""
    plugin: bool = False

    def __str__(self) -> str:
        if self.loads:
            return "loads, with the tests' plugin" if self.plugin else "loads"
        words = " ".join(self.words.split()).replace("|", "\\|")
        cut = words if len(words) <= _LONGEST else f"{words[:_LONGEST].rsplit(' ', 1)[0]} …"
        return f'refused: "{cut}"'


@dataclass(frozen=True)
class Damage:
    """KL divergences of a trained model with every linear under one candidate, nats per token.

    Attributes:
        config_hash: Of the candidate.
        served: Served scheme from the served unquantized model, over what the runtime tells.
        se: Its standard error over the captions.
        restored: The files in PyTorch, over the same.
        scored: The scheme as scored in PyTorch, over the same.
        probed: The last over the whole vocabulary, as a probe measures it.
        noise: The served unquantized model from PyTorch's, over the same.
    """

    config_hash: str
    served: float
    se: float
    restored: float
    scored: float
    probed: float
    noise: float


@dataclass(frozen=True)
class Served:
    """All answers and figures of one runtime.

    Attributes:
        runtime: Package and version. processor: The class of the CPU (:mod:`layerbits.checkpoint.processors`). date:
            When it was asked. model: What the damage was measured on.
        asked, damage: By format and label.
    """

    runtime: str
    processor: str
    date: str
    model: str
    asked: Mapping[tuple[str, str], Answer]
    damage: Mapping[tuple[str, str], Damage]

    def answer(self, label: Label) -> Answer | None:
        """What the runtime made of a label; ``None`` = it was not asked."""
        return self.asked.get((label.format, label.algo))

    def loads(self, label: Label) -> bool:
        """Whether the runtime was asked and loaded it."""
        found = self.answer(label)
        return found is not None and found.loads

    def measured(self, label: Label, config_hash: str) -> Damage | None:
        """The damage of a candidate as served under a label; ``None`` = not measured."""
        found = self.damage.get((label.format, label.algo))
        return found if found is not None and found.config_hash == config_hash else None


def read_served() -> Served:
    """The recorded figures."""
    told = json.loads(DATA.read_text("utf-8"))
    return Served(
        told["runtime"],
        told["processor"],
        told["date"],
        told["model"],
        {(format, label): Answer(**a) for format, labels in told["asked"].items() for label, a in labels.items()},
        {(format, label): Damage(**d) for format, labels in told["served"].items() for label, d in labels.items()},
    )
