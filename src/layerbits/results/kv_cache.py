"""What quantizing the keys and values of each block costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerbits.plain import JsonMapping


@dataclass(frozen=True)
class KvScore:
    """One attention module under one format of the KV cache.

    Attributes:
        format: Name of the format. module: Full name of the attention module. block: Its block.
        score: Raw score, at the output of the attention. predicted_kl: Nats per token.
    """

    format: str
    module: str
    block: int | None
    score: float
    predicted_kl: float


def kv_sums(scores: Sequence[KvScore]) -> dict[str, float]:
    """Predicted KL of each format, summed over the blocks."""
    return {form: sum(s.predicted_kl for s in scores if s.format == form) for form in _formats(scores)}


def kv_lines(scores: Sequence[KvScore], what: str) -> Iterator[tuple[str, int, float]]:
    """Format, block and ``score`` or ``predicted_kl``."""
    for form in _formats(scores):
        yield from ((form, s.block, getattr(s, what)) for s in scores if s.format == form and s.block is not None)


def kv_from_json(records: Sequence[JsonMapping]) -> tuple[KvScore, ...]:
    """Reads the records of a manifest."""
    return tuple(KvScore(**record) for record in records)


def _formats(scores: Sequence[KvScore]) -> list[str]:
    return list(dict.fromkeys(s.format for s in scores))
