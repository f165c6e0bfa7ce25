"""The families of ``docs/models.md``, tried: ``python -m tests.families_table`` writes the table anew."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerbits.checkpoint.label import FORMATS, MODELOPT
from layerbits.errors import Unsupported, UserError
from layerbits.export.plan import plan_export
from layerbits.export.scheme import export_scheme
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve, undecided
from layerbits.inputs.offload import offload
from layerbits.probing.loading import Prepared
from layerbits.results.assignment import Assignment
from layerbits.results.result import Group, by_kind
from layerbits.schemes import Scheme
from layerbits.scoring import onepass, stock
from layerbits.scoring.job import Scores

from .autograd import autograd_scores
from .families import FAMILIES, build, scored
from .integration.export_support import FILES
from .integration.schemes_support import CALIBRATION, DATA, INFO
from .integration.scoring_support import candidate, configs, job, loaded

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by python -m tests.families_table -->", "<!-- families: end -->"
PAIR = "wfp8_afp8"
TOLERANCE = 1e-6
NOTES = {"opt": "compared with dropout 0: stock scores in training mode, where a block of OPT drops activations"}
"""What is to be known of a comparison with stock."""

MODES = ("fast", "lean", "offload")
_BOUNDS = (1e-6, 1e-5)
"""Differences up to these are shown as these: what lies below is rounding, another on another processor."""
_COLUMNS = ("family", "what is scored, by kind", "left out by ModelOpt's presets", *MODES, "stock", "export")


@dataclass(frozen=True)
class Tried:
    """What happened to a family.

    Attributes:
        one, reference: Scores of one pass and of stock, or why there are none.
        off: Memory mode, or ``stock`` → largest relative difference of a raw score from plain autograd, or why there
            is none.
        left_out: Keys of the groups that ModelOpt's presets leave out.
        export: Format → why a scheme of the others is not exported, empty where it is and the proof passes.
        undecided: What ModelOpt's search has no decision for.
    """

    family: str
    one: Scores | str
    reference: Scores | str
    off: Mapping[str, float | str]
    left_out: tuple[str, ...]
    export: Mapping[str, str]
    undecided: str = ""

    @property
    def difference(self) -> float | None:
        """Largest relative difference of a score; ``None`` where one of the engines has none."""
        if isinstance(self.one, str) or isinstance(self.reference, str):
            return None
        if (self.one.groups, self.one.other_weights) != (self.reference.groups, self.reference.other_weights):
            return float("inf")
        return float(np.abs(self.one.raw / self.reference.raw - 1).max())

    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        return (
            f"`{self.family}`",
            self._kinds(),
            ", ".join(f"`{key}`" for key in self.left_out),
            *(_figure(self.off[mode]) for mode in (*MODES, "stock")),
            ", ".join(form for form, failed in self.export.items() if not failed) or "no",
        )

    def remarks(self) -> tuple[str, ...]:
        """What is to be known of the last five cells, a text each, empty where there is nothing."""
        modes = [found if isinstance(found := self.off[mode], str) else "" for mode in MODES]
        if isinstance(self.one, Scores):
            modes[0] = self.undecided
        reference = self.reference if isinstance(self.reference, str) else "; ".join(self.reference.notes[-1:])
        failed = [f"{form}: {said}" for form, said in self.export.items() if said]
        return *modes, NOTES.get(self.family, reference), "; ".join(failed)

    def _kinds(self) -> str:
        if isinstance(self.one, str):
            return ""
        parts = []
        for kind, positions in by_kind(self.one.groups):
            names = ["+".join(m.rpartition(".")[2] for m in self.one.groups[i].modules) for i in positions]
            parts.append(f"`{kind}` {', '.join(dict.fromkeys(names))}")
        return "; ".join(parts)


def tried(family: str) -> Tried:
    """Scores a tiny random checkpoint of a family with both engines, head aside, and exports it."""
    subject = loaded(build(family))
    expected = np.array(autograd_scores(_job(family, subject, "")))
    by_mode = {mode: _mode_scores(family, mode) for mode in MODES}
    one, reference = by_mode["fast"], _scores(family, stock, subject)
    off = {mode: _off(scores, expected) for mode, scores in {**by_mode, "stock": reference}.items()}
    if isinstance(one, str):
        return Tried(family, one, reference, off, (), {})
    form = candidate(PAIR).format.linear
    covered = [g for g in one.groups if all(form.covers(name, kind=g.kind) for name in g.modules)]
    left_out = tuple(g.key for g in one.groups if g not in covered)
    export = {form: _exported(family, covered, form) for form in FORMATS}
    if len(set(export.values())) == 1 and any(export.values()):
        export = {"no format": export[MODELOPT]}
    return Tried(family, one, reference, off, left_out, export, "; ".join(undecided(subject.model)))


def table(families: Sequence[Tried]) -> str:
    """The section between the markers of the document; remarks are numbered and follow the table."""
    numbers: dict[str, int] = {}
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for family in families:
        cells = list(family.cells())
        for i, remark in enumerate(family.remarks(), start=-5):
            if remark:
                cells[i] += f" [{numbers.setdefault(_general(remark), len(numbers) + 1)}]"
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{number}. {remark}" for remark, number in numbers.items()]
    return "\n".join((BEGIN, "", *lines, "", *notes, "", END))


def main(families: Sequence[str]) -> None:
    """Writes the table into the document, or prints the rows of some families."""
    if families:
        print(table([tried(family) for family in families]))
        return
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{table([tried(family) for family in FAMILIES])}{after}")


def _mode_scores(family: str, mode: str) -> Scores | str:
    subject = loaded(build(family))
    if (
        mode == "offload"
        and (refused := _quietly(lambda: offload(subject.model, "cpu"), ""))
        and isinstance(refused, str)
    ):
        return refused
    return _scores(family, onepass, subject, memory=mode)


def _off(scores: Scores | str, expected: Any) -> float | str:
    """Largest relative difference of a raw score."""
    if isinstance(scores, str):
        return scores
    apart = np.abs(scores.raw[:, 0] - expected)
    return float((apart / np.where(apart > 0, expected, 1)).max())


def _figure(found: float | str) -> str:
    if isinstance(found, str):
        return "refused"
    bound = next((bound for bound in _BOUNDS if found <= bound), None)
    return f"{found:.1%} off" if bound is None else f"≤ {bound:.0e}"


def _scores(family: str, engine: Any, subject: Any, **changes: Any) -> Scores | str:
    with tempfile.TemporaryDirectory() as folder:
        wanted = _job(family, subject, folder, **changes)
        found = _quietly(lambda: engine.score(wanted), "ModelOpt cannot run it")
    assert isinstance(found, (Scores, str))
    return found


def _job(family: str, subject: Any, folder: str, **changes: Any) -> Any:
    whole = job(subject, folder, configs(PAIR), **changes)
    return replace(whole, scored=scored(family, whole.scored))


def _exported(family: str, groups: Sequence[Group], form: str) -> str:
    """Exports a checkpoint with some groups quantized: empty where the proof passes, else what was said."""
    model, info = build(family).bfloat16(), candidate(PAIR).info
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"

        def export() -> str:
            model.save_pretrained(source)
            for name, text in FILES.items():
                (source / name).write_text(text)
            resolved = resolve(ModelSpec(family, str(source)))
            whole = replace(INFO, revision=resolved.revision, dtype="bfloat16")
            chosen, how = Assignment(info.name for _ in groups), {"method": "budget"}
            scheme = Scheme("all", ("r",), whole, DATA, tuple(groups), (info,), chosen, 8.0, None, 0.0, 0.0, how)
            plan = plan_export(
                Prepared(scheme, resolved, None, None, CALIBRATION), Path(folder) / "out" / "all", format=form
            )
            return "" if export_scheme(plan, "cpu").proof.passed else "the proof fails"

        return str(_quietly(export, "it fails")).partition("; the report is ")[0]


def _quietly(function: Callable[[], Any], failed: str) -> Any:
    """What a function returns, or why it does not."""
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            return function()
        except (Unsupported, UserError) as error:
            return str(error)
        except (IndexError, RuntimeError) as error:
            return f"{failed} ({type(error).__name__})"


def _general(remark: str) -> str:
    """A remark with modules by their last names."""
    return re.sub(r"\b\w+(?:\.\w+){2,}\.(\w+)", r"`….\1`", remark)


if __name__ == "__main__":
    main(sys.argv[1:])
