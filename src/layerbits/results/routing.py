"""Which experts the tokens of a run went to: an expert that saw few of them is scored on few of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOOR = 32
"""Tokens below which an expert is called starved. An expert's share of a score is a mean of squares over its tokens; of
``n`` of them, normally distributed, the relative standard error is ``√(2/n)``: a quarter at 32."""


@dataclass(frozen=True)
class Routing:
    """Tokens per expert of one expert module.

    Attributes:
        group: Key of its group.
        block: Decoder block.
        calibration: Tokens per expert in calibration; empty where no range had to be found.
        scoring: Tokens per expert in the scoring batches; a token counts once for each of its experts.
    """

    group: str
    block: int | None
    calibration: tuple[int, ...]
    scoring: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """How well the tokens of one phase cover the experts of a model.

    Attributes:
        phase: ``calibration`` or ``scoring``.
        experts: In all modules together.
        unseen: Experts that saw no token.
        starved: Experts that saw fewer than :data:`FLOOR`, the unseen ones included.
        least: Tokens of the expert that saw fewest.
        median: Tokens of the median expert.
        factor: How many times as many tokens would give every expert :data:`FLOOR`, as the shares are; of an unseen
            expert, at least.
    """

    phase: str
    experts: int
    unseen: int
    starved: int
    least: int
    median: float
    factor: float


def coverage(routing: Sequence[Routing]) -> tuple[Coverage, ...]:
    """The phases that tokens were counted in."""
    rows = []
    for phase in ("calibration", "scoring"):
        counts = sorted(count for module in routing for count in getattr(module, phase))
        if counts:
            middle = counts[(len(counts) - 1) // 2], counts[len(counts) // 2]
            rows.append(
                Coverage(
                    phase=phase,
                    experts=len(counts),
                    unseen=counts.count(0),
                    starved=sum(count < FLOOR for count in counts),
                    least=counts[0],
                    median=sum(middle) / 2,
                    factor=FLOOR / max(counts[0], 1),
                )
            )
    return tuple(rows)


def coverage_words(phase: Coverage) -> str:
    """One phase in a sentence."""
    return (
        f"{phase.phase}: of {phase.experts:,} experts {phase.unseen:,} saw no token and {phase.starved:,} fewer than "
        f"{FLOOR} (least {phase.least:,}, median {phase.median:,.0f})"
    )


def coverage_warnings(routing: Sequence[Routing], captions: int | None) -> tuple[str, ...]:
    """What a reader should know before the scores of experts, a line per phase that starves some.

    Args:
        routing: All expert modules.
        captions: Captions that the tokens came from.
    """
    lines = []
    for phase in coverage(routing):
        if not phase.starved:
            continue
        least = "at least " if phase.unseen else ""
        size = (
            f"{least}{math.ceil(phase.factor * captions):,} captions"
            if captions
            else f"{phase.factor:.0f} times as many"
        )
        lines.append(
            f"{coverage_words(phase)}: what these experts add to a score is uncertain (a mean of {FLOOR} squares has a "
            f"relative error of a quarter); {size} would give each {FLOOR}. The activation range is shared by all "
            "experts of a module, so that an expert without a token has the range of the others"
        )
    return tuple(lines)
