"""The shipped candidates that an export has a label for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import FP4_VARIANTS, QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.checkpoint.label import FORMATS, Label
from layerbits.checkpoint.labels import label_or_reason
from layerbits.errors import Unsupported


@dataclass(frozen=True)
class Exportable:
    """A candidate that at least one format has a label for.

    Attributes:
        pair, variant, granularity: Where it comes from; the variant of FP4 is empty for other weights.
        labels: Format → its label, ``None`` where it has none.
    """

    pair: str
    variant: str
    granularity: str
    candidate: Candidate
    labels: Mapping[str, Label | None]

    @property
    def known(self) -> list[Label]:
        """Its labels."""
        return [label for label in self.labels.values() if label is not None]


@cache
def exportable() -> tuple[Exportable, ...]:
    """The distinct candidates of the shipped pairs that are not experimental and have a label, in the table's order."""
    overlays = load_overlays()
    return tuple(
        found
        for pair in deployed_pairs()
        for variant in variants_of(pair)
        for found in _exportable(pair, variant, overlays)
    )


def deployed_pairs() -> list[QuantPair]:
    """The shipped pairs that are not experimental."""
    return [pair for pair in load_pairs() if not pair.experimental]


def variants_of(pair: QuantPair) -> tuple[str, ...]:
    """What FP4 can mean in a pair; one empty name for other weights."""
    return FP4_VARIANTS if pair.weight == "fp4" else ("",)


def candidate_of(pair: QuantPair, overlay: Overlay, variant: str) -> Candidate:
    """A pair under an overlay."""
    return resolve_candidate(pair, overlay, variant or "mxfp4", experimental=True)


def _exportable(pair: QuantPair, variant: str, overlays: Sequence[Overlay]) -> Iterator[Exportable]:
    seen: set[str] = set()
    for overlay in overlays:
        candidate = candidate_of(pair, overlay, variant)
        if candidate.info.config_hash in seen or not _computed(candidate):
            continue
        seen.add(candidate.info.config_hash)
        labels = {format: label_or_reason(candidate.info, format)[0] for format in FORMATS}
        if any(labels.values()):
            yield Exportable(pair.name, variant, overlay.name, candidate, labels)


def _computed(candidate: Candidate) -> bool:
    """Whether fake quantization computes it at all."""
    try:
        check(candidate, {}, True)
    except Unsupported:
        return False
    return True
