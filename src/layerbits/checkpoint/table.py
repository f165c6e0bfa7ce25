"""Which candidates export and as what, and what vLLM makes of it, as Markdown.

``python -m layerbits.checkpoint.table`` prints it. ``docs/export.md`` holds it between two comments; a test says when
it is stale, ``--write`` writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import FP4_VARIANTS, QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.table import load_overlays, load_pairs
from layerbits.checkpoint.label import COMPRESSED, FORMATS, MODELOPT, Label
from layerbits.checkpoint.labels import label_or_reason
from layerbits.checkpoint.runtimes import VERSION, reads, vllm
from layerbits.checkpoint.served import Served, read_served
from layerbits.errors import Unsupported

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_NAMES = {MODELOPT: "ModelOpt", COMPRESSED: "compressed-tensors"}


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


def exportable() -> Iterator[Exportable]:
    """The distinct candidates of the shipped pairs that are not experimental and have a label, in the table's order."""
    for pair in _pairs():
        for variant in _variants(pair):
            yield from _exportable(pair, variant)


def table() -> str:
    """A section per shipped pair that is not experimental (FP4 weights: one per variant), and how many are served."""
    pairs, served, rows = _pairs(), read_served(), list(exportable())
    read = {row.pair for row in rows if any(map(reads, row.known))}
    loaded = {row.pair for row in rows if any(served.loads(label) for label in row.known)}
    lines = [
        f"vLLM {VERSION} reads {len(read)} of the {len(pairs)} pairs in some format, by its source: {_listed(read)}.",
        f"{served.runtime} loaded {len(loaded)} of them on a CPU ({served.date}): {_listed(loaded)}.",
    ]
    for pair in pairs:
        for variant in _variants(pair):
            mine = [row for row in rows if (row.pair, row.variant) == (pair.name, variant)]
            lines.append(_section(pair, variant, mine, served))
    return "\n\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the table between its two comments renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def _pairs() -> list[QuantPair]:
    return [pair for pair in load_pairs() if not pair.experimental]


def _variants(pair: QuantPair) -> tuple[str, ...]:
    return FP4_VARIANTS if pair.weight == "fp4" else ("",)


def _candidate(pair: QuantPair, overlay: Overlay, variant: str) -> Candidate:
    return resolve_candidate(pair, overlay, variant or "mxfp4", experimental=True)


def _exportable(pair: QuantPair, variant: str) -> Iterator[Exportable]:
    seen: set[str] = set()
    for overlay in load_overlays():
        candidate = _candidate(pair, overlay, variant)
        if candidate.info.config_hash in seen or not _computed(candidate):
            continue
        seen.add(candidate.info.config_hash)
        labels = {format: label_or_reason(candidate.info, format)[0] for format in FORMATS}
        if any(labels.values()):
            yield Exportable(pair.name, variant, overlay.name, candidate, labels)


def _section(pair: QuantPair, variant: str, exported: Sequence[Exportable], served: Served) -> str:
    """The granularities of a pair that export, and why the default does not where it does not."""
    title = f"**`{pair.name}`**" + (f", `fp4={variant}`" if variant else "")
    rows = [_row(row, label, served) for row in exported for label in row.known]
    about = ("granularity", "bits", "format", "label", "vLLM's source", served.runtime)
    header = (*about, "served KL", "restored", "scored", "probed")
    lines = [title, ""]
    if rows:
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *rows]
    return "\n".join([*lines, *_refusals(_candidate(pair, Overlay("default", {}), variant))])


def _row(row: Exportable, label: Label, served: Served) -> str:
    answer, damage = served.answer(label), served.measured(label, row.candidate.info.config_hash)
    asked = "not run" if answer is None else str(answer)
    if answer is not None and not answer.loads and reads(label):
        asked += "; on a GPU: not run"
    kl = [""] * 4
    if damage is not None:
        kl = [
            f"{damage.served:.4f} ({damage.se:.1g})",
            *(f"{v:.4f}" for v in (damage.restored, damage.scored, damage.probed)),
        ]
    cells = (f"`{row.granularity}`", f"{row.candidate.info.bits:g}", _NAMES[label.format], f"`{label.algo}`")
    return f"| {' | '.join((*cells, vllm(label), asked, *kl))} |"


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{pair.name}`" for pair in _pairs() if pair.name in names) or "none"


def _refusals(candidate: Candidate) -> list[str]:
    """Why the default granularity has no label, a line per format."""
    reasons = {format: label_or_reason(candidate.info, format) for format in FORMATS}
    return [f"- `default`, {_NAMES[format]}: {why}" for format, (label, why) in reasons.items() if label is None]


def _computed(candidate: Candidate) -> bool:
    """Whether fake quantization computes it at all."""
    try:
        check(candidate, {}, True)
    except Unsupported:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(PAGE.read_text("utf-8")))
    else:
        print(table(), end="")
