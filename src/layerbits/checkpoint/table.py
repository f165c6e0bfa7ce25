"""Which quant pairs export and as what, as Markdown: ``python -m layerbits.checkpoint.table`` prints it.

``docs/export.md`` holds it between two comments; a test says when it is stale, ``--write`` writes it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import FP4_VARIANTS, QuantPair
from layerbits.candidates.table import load_overlays, load_pairs
from layerbits.checkpoint.labels import label_of
from layerbits.errors import Unsupported

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

VLLM_READS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")
"""Labels that vLLM's ModelOpt loader knows among ours.

``QUANT_ALGOS`` in ``vllm/model_executor/layers/quantization/modelopt.py`` at commit 00155cdecca7.
"""

_HEADER = ("quant pair", "FP4", "exports as", "vLLM", "other granularities that export", "why not")


def table() -> str:
    """The table, a row per shipped pair that is not experimental (FP4 weights: one per variant)."""
    rows = [row for pair in load_pairs() if not pair.experimental for row in _rows(pair)]
    lines = [f"| {' | '.join(_HEADER)} |", f"|{'---|' * len(_HEADER)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the table between its two comments renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def _rows(pair: QuantPair) -> list[tuple[str, ...]]:
    variants = FP4_VARIANTS if pair.weight == "fp4" else ("",)
    return [_row(pair, variant) for variant in variants]


def _row(pair: QuantPair, variant: str) -> tuple[str, ...]:
    made = {o.name: resolve_candidate(pair, o, variant or "mxfp4", experimental=True) for o in load_overlays()}
    default = made["default"]
    label, why = _label(default)
    seen = {default.info.config_hash}
    others = []
    for name, candidate in made.items():
        if candidate.info.config_hash in seen:
            continue
        seen.add(candidate.info.config_hash)
        if (other := _label(candidate)[0]) and _computed(candidate):
            others.append(f"`{name}`: `{other}`" if other != label else f"`{name}`")
    reads = "" if not label else "reads it" if label in VLLM_READS else "refuses it"
    return f"`{pair.name}`", variant, f"`{label}`" if label else "refused", reads, ", ".join(others), why


def _label(candidate: Candidate) -> tuple[str, str]:
    """Label of a candidate, or why it has none."""
    try:
        return label_of(candidate.info).algo, ""
    except Unsupported as error:
        return "", str(error).partition(" cannot be exported: ")[2].removesuffix(
            "; it stays available as fake quantization"
        )


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
