"""Which candidates export and as what, and what vLLM makes of it on which processor, as Markdown.

``python tools/docs/exports.py`` prints both tables. ``docs/export.md`` holds the first between two comments,
``docs/processors.md`` the second; a test says when one is stale, ``--write`` writes them anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from layerbits.candidates.candidate import Candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.checkpoint.gpus import FP8_SCALES, GENERATIONS, HOPPER, LEFT, kernel
from layerbits.checkpoint.gpus import VERSION as GPU_VERSION
from layerbits.checkpoint.label import COMPRESSED, FORMATS, MODELOPT, Label
from layerbits.checkpoint.labels import label_or_reason
from layerbits.checkpoint.processors import MISSING, NO_KERNEL, UNKNOWN, Figures, Record, computed, records
from layerbits.checkpoint.runtimes import VERSION, reads, vllm
from tools.docs.damage import tables
from tools.docs.exportable import Exportable, candidate_of, deployed_pairs, exportable, variants_of
from tools.docs.served import Answer, Served, read_served

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_NAMES = {MODELOPT: "ModelOpt", COMPRESSED: "compressed-tensors"}
_HOW = {LEFT: "activations in 16 bits", FP8_SCALES: "group scales in FP8"}


def table() -> str:
    """A section per shipped pair that is not experimental (FP4 weights: one per variant), and how many are served."""
    pairs, served, rows = deployed_pairs(), read_served(), exportable()
    read = {row.pair for row in rows if any(map(reads, row.known))}
    loaded = {row.pair for row in rows if any(served.loads(label) for label in row.known)}
    lines = [
        f"vLLM {VERSION} reads {len(read)} of the {len(pairs)} pairs in some format, by its source: {_listed(read)}.",
        f"{served.runtime} loaded {len(loaded)} of them on a CPU with {served.processor} ({served.date}): "
        f"{_listed(loaded)}.",
    ]
    for pair in pairs:
        for variant in variants_of(pair):
            mine = [row for row in rows if (row.pair, row.variant) == (pair.name, variant)]
            lines.append(_section(pair, variant, mine, served))
    return "\n\n".join(lines) + "\n"


def processors() -> str:
    """What each class of processor computes of each label that vLLM reads, and why not as written."""
    classes: dict[str, list[Record]] = {}
    for record in records():
        classes.setdefault(record.processor.name, []).append(record)
    labels = {x.algo: x for row in exportable() for x in row.known if reads(x)}
    notes: list[str] = []
    rows, nowhere = [], []
    for algo, label in sorted(labels.items()):
        answers = [computed(label, of[0].processor) for of in classes.values()]
        if all(answer.how == NO_KERNEL for answer in answers):
            nowhere.append(f"`{algo}`")
            continue
        cells = []
        for answer, of in zip(answers, classes.values(), strict=True):
            notes += [answer.how] if answer.how and answer.how not in notes else []
            mark = f" ({notes.index(answer.how) + 1})" if answer.how else ""
            cells.append(f"{answer.state}{mark}{' *' if any(algo in r.found for r in of) else ''}")
        rows.append(f"| `{algo}` | {' | '.join(cells)} |")
    lines = [f"| label | {' | '.join(classes)} |", f"|{'---|' * (len(classes) + 1)}", *rows, ""]
    lines += [f"{number}. {note}." for number, note in enumerate(notes, 1)]
    lines += ["", f"No class has a kernel of vLLM {VERSION} for {', '.join(nowhere)}.", ""]
    lines += [f"- {name}: {'; '.join(record.source for record in of)}." for name, of in classes.items()]
    header = ("CPU", "scheme", "tokens", "verdict", "ratio", "t", "served", "restored", "both rounded", "noise")
    lines += ["", "Serve checks of SmolLM2-135M, KL in nats per token:", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [_check(record, made) for of in classes.values() for record in of for made in record.checks]
    return "\n".join(lines) + "\n"


def _check(record: Record, made: Figures) -> str:
    numbers = [f"{v:.4f}" for v in (made.served, made.restored, made.rounded, made.noise)]
    cells = (record.processor.name, made.scheme, f"{made.tokens:,}", made.outcome, f"{made.ratio:.2f}", f"{made.t:.1f}")
    return f"| {' | '.join((*cells, *numbers))} |"


def gpus() -> str:
    """What each generation of GPUs computes of each label, and where that is known from."""
    labels = sorted({(label.format, label.algo) for row in exportable() for label in row.known})
    notes: list[str] = []
    rows, nowhere = [], []
    for format, algo in labels:
        answers = [kernel(format, algo, where) for where in GENERATIONS]
        hopper = answers[GENERATIONS.index(HOPPER)]
        if hopper.computed.state == MISSING and all(a.computed.state in (MISSING, UNKNOWN) for a in answers):
            nowhere.append(f"`{algo}` ({_NAMES[format]})")
            continue
        cells = []
        for answer in answers:
            if answer.source and answer.source not in notes:
                notes.append(answer.source)
            mark = f" ({notes.index(answer.source) + 1})" if answer.source else ""
            how = _HOW.get(answer.computed.how, answer.computed.state)
            cells.append(f"{how}{mark}")
        name = hopper.name.removesuffix("LinearKernel") or "–"
        rows.append(f"| `{algo}` | {_NAMES[format]} | {' | '.join(cells)} | {name} |")
    lines = [f"| label | format | {' | '.join(GENERATIONS)} | kernel on {HOPPER} |"]
    lines += [f"|{'---|' * (len(GENERATIONS) + 3)}", *rows, ""]
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    lines += ["", f"vLLM {GPU_VERSION} on an H200 refuses {', '.join(nowhere)}."]
    return "\n".join(lines) + "\n"


def serving() -> str:
    """The tables of the page on serving: CPUs, then GPUs, then the damage on a GPU."""
    return f"{processors()}\n### GPUs\n\n{gpus()}\n### Damage on a GPU\n\n{tables()}"


PAGES: Mapping[str, Callable[[], str]] = {"export.md": table, "processors.md": serving}
"""The pages with a table, and what makes it."""


def page(text: str, made: str) -> str:
    """A page with the table between its two comments renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def _section(pair: QuantPair, variant: str, exported: Sequence[Exportable], served: Served) -> str:
    """The granularities of a pair that export, and why the default does not where it does not."""
    title = f"**`{pair.name}`**" + (f", `fp4={variant}`" if variant else "")
    rows = [_row(row, label, served) for row in exported for label in row.known]
    runtimes = (f"{served.runtime} on {served.processor}", f"vllm {GPU_VERSION} on an H200")
    about = ("granularity", "bits", "format", "label", "vLLM's source", *runtimes)
    header = (*about, "served KL (CPU)", "restored", "scored", "probed")
    lines = [title, ""]
    if rows:
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *rows]
    return "\n".join([*lines, *_refusals(candidate_of(pair, Overlay("default", {}), variant))])


def _row(row: Exportable, label: Label, served: Served) -> str:
    answer, damage = served.answer(label), served.measured(label, row.candidate.info.config_hash)
    asked = "not run" if answer is None else str(answer)
    kl = [""] * 4
    if damage is not None:
        kl = [
            f"{damage.served:.4f} ({damage.se:.1g})",
            *(f"{v:.4f}" for v in (damage.restored, damage.scored, damage.probed)),
        ]
    cells = (f"`{row.granularity}`", f"{row.candidate.info.bits:g}", _NAMES[label.format], f"`{label.algo}`")
    return f"| {' | '.join((*cells, vllm(label), asked, _on_h200(label), *kl))} |"


def _on_h200(label: Label) -> str:
    """What the H200 made of a label: its words, or how it computes it."""
    found = kernel(label.format, label.algo, HOPPER).computed
    if found.state == MISSING:
        return str(Answer(False, found.how))
    return f"loads; {_HOW[found.how]}" if found.how else "loads"


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{pair.name}`" for pair in deployed_pairs() if pair.name in names) or "none"


def _refusals(candidate: Candidate) -> list[str]:
    """Why the default granularity has no label, a line per format."""
    reasons = {format: label_or_reason(candidate.info, format) for format in FORMATS}
    return [f"- `default`, {_NAMES[format]}: {why}" for format, (label, why) in reasons.items() if label is None]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for name, made in PAGES.items():
            file = DOCS / name
            file.write_text(page(file.read_text(encoding="utf-8"), made()), encoding="utf-8")
    else:
        print(*(made() for made in PAGES.values()), sep="\n", end="")
