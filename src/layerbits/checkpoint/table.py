"""Which candidates export and as what, as Markdown: ``python -m layerbits.checkpoint.table`` prints it.

``docs/export.md`` holds it between two comments; a test says when it is stale, ``--write`` writes it anew.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import FP4_VARIANTS, QuantPair
from layerbits.candidates.table import load_overlays, load_pairs
from layerbits.checkpoint.label import COMPRESSED, FORMATS, MODELOPT
from layerbits.checkpoint.labels import label_or_reason
from layerbits.checkpoint.runtimes import reads, vllm
from layerbits.errors import Unsupported

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_NAMES = {MODELOPT: "ModelOpt", COMPRESSED: "compressed-tensors"}
_HEADER = ("granularity", "bits", "ModelOpt", "vLLM", "compressed-tensors", "vLLM")


def table() -> str:
    """A section per shipped pair that is not experimental (FP4 weights: one per variant), and how many are served."""
    pairs = [pair for pair in load_pairs() if not pair.experimental]
    sections = {pair.name: [_section(pair, variant) for variant in _variants(pair)] for pair in pairs}
    served = [name for name, parts in sections.items() if any(part.served for part in parts)]
    lines = [
        f"vLLM reads {len(served)} of the {len(pairs)} pairs in some format: {', '.join(f'`{n}`' for n in served)}."
    ]
    lines += [part.text for parts in sections.values() for part in parts]
    return "\n\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the table between its two comments renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


@dataclass(frozen=True)
class _Section:
    text: str
    served: bool


def _variants(pair: QuantPair) -> tuple[str, ...]:
    return FP4_VARIANTS if pair.weight == "fp4" else ("",)


def _section(pair: QuantPair, variant: str) -> _Section:
    """The granularities of a pair that export, and why the default does not where it does not."""
    made = {o.name: resolve_candidate(pair, o, variant or "mxfp4", experimental=True) for o in load_overlays()}
    title = f"**`{pair.name}`**" + (f", `fp4={variant}`" if variant else "")
    seen: set[str] = set()
    rows, labels = [], []
    for name, candidate in made.items():
        if candidate.info.config_hash in seen or not _computed(candidate):
            continue
        seen.add(candidate.info.config_hash)
        found = [label_or_reason(candidate.info, format)[0] for format in FORMATS]
        if not any(found):
            continue
        labels += [label for label in found if label is not None]
        cells = [cell for label in found for cell in ((f"`{label.algo}`", vllm(label)) if label else ("", ""))]
        rows.append((f"`{name}`", f"{candidate.info.bits:g}", *cells))
    lines = [title, ""]
    if rows:
        lines += [
            f"| {' | '.join(_HEADER)} |",
            f"|{'---|' * len(_HEADER)}",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    lines += _refusals(made["default"])
    return _Section("\n".join(lines), any(map(reads, labels)))


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
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table(), end="")
