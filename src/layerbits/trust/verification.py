"""Runs a past run again from its record, and compares what comes out with what it found."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from layerbits.atomic import dated, optional_part, whole_folder, write_json
from layerbits.errors import UserError
from layerbits.plain import finite_object
from layerbits.results.result import SensitivityResult
from layerbits.trust.reproduce import identity, plan_of_run

BOUNDS = {"cpu": 0.0, "cuda": 1e-3}
"""Largest relative difference of a raw score that passes: sums on a GPU, or another device, come in another order."""
DEVICES = ("recorded", "cpu", "cuda")
_LISTED = 10
_VERSIONS = ("version.", "python", "platform", "gpu.", "git.commit", "device")


class Differs(UserError):
    """The scores differ by more than the bound."""


@dataclass(frozen=True)
class Moved:
    """A group that has another rank than before (1 = most sensitive)."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class Verification:
    """A run and its repetition.

    Attributes:
        source: Run id or path of the run.
        device: Where it was repeated.
        bound: Relative difference that passes.
        groups: How many scores were compared.
        identical: Whether every score is the same, to the last bit.
        largest: Largest relative difference of a raw score; infinite where one is finite and the other is not.
        layer: Where that is.
        spearman: Rank correlation of the scores; NaN where there are too few.
        moved: Groups whose rank changed, largest change first.
        same: What was found to be the same before scoring: name → value.
        changed: Versions and hardware that differ: name → (before, now).
    """

    source: str
    device: str
    bound: float
    groups: int
    identical: bool
    largest: float
    layer: str
    spearman: float
    moved: tuple[Moved, ...]
    same: Mapping[str, str]
    changed: Mapping[str, tuple[str, str]]

    @property
    def passed(self) -> bool:
        """Whether no score differs by more than the bound."""
        return self.largest <= self.bound

    @property
    def sentence(self) -> str:
        """The verdict, in one line."""
        if self.identical:
            return f"identical: the {self.groups} scores of {self.source} are the same to the last bit ({self.device})"
        verdict = "within" if self.passed else "beyond"
        return (
            f"{verdict} the bound of {self.bound:g}: the scores of {self.source} differ by up to {self.largest:.3g} "
            f"relative ({self.layer}), {len(self.moved)} of {self.groups} ranks changed ({self.device})"
        )

    def metrics(self) -> dict[str, float]:
        """For the tracking server."""
        return {
            "verify/identical": float(self.identical),
            "verify/largest_relative_difference": self.largest,
            "verify/bound": self.bound,
            "verify/spearman": self.spearman,
            "verify/ranks_changed": float(len(self.moved)),
            "verify/groups": float(self.groups),
        }

    def to_json(self) -> dict[str, object]:
        """Plain JSON data; what is not finite is ``None``."""
        return {
            "source_run_id": self.source,
            "device": self.device,
            "passed": self.passed,
            "sentence": self.sentence,
            "layer": self.layer,
            **{name.removeprefix("verify/"): value for name, value in finite_object(self.metrics()).items()},
            "moved": [asdict(m) for m in self.moved],
            "same": dict(self.same),
            "changed": {name: list(both) for name, both in self.changed.items()},
        }

    def markdown(self) -> str:
        """The report."""
        spearman = "–" if math.isnan(self.spearman) else f"{self.spearman:.6f}"
        facts = [
            [
                "largest relative difference of a score",
                f"{self.largest:.3g}{f' ({self.layer})' if self.largest else ''}",
            ],
            ["passes up to", f"{self.bound:g}"],
            ["Spearman", spearman],
            ["ranks changed", f"{len(self.moved)} of {self.groups}"],
            *([f"{name}, the same", f"`{value}`"] for name, value in self.same.items()),
            *([f"{name}, changed", f"{before} → {now}"] for name, (before, now) in self.changed.items()),
        ]
        lines = [f"# Verification of {self.source}", "", f"**{self.sentence}**", "", "| what | value |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in facts]
        if self.moved:
            lines += ["", "| group | rank before | rank now |", "|---|---:|---:|"]
            lines += [f"| `{m.layer}` | {m.before} | {m.after} |" for m in self.moved[:_LISTED]]
        return "\n".join(lines) + "\n"


def compare(reference: str, before: SensitivityResult, after: SensitivityResult, bound: float) -> Verification:
    """Compares the raw scores of a run and its repetition.

    Args:
        reference: Run id or path of the first.
        before: The run.
        after: Its repetition.
        bound: Relative difference that passes.

    Raises:
        UserError: They have other groups.
    """
    from layerbits.trust.stability import spearman

    keys = [g.key for g in before.groups]
    if keys != [g.key for g in after.groups]:
        raise UserError(f"{reference} has other groups than its repetition; the model or its grouping has changed")
    old, new = before.scores, after.scores
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(same, 0.0, np.abs(new - old) / np.abs(old))
    relative[np.isnan(relative)] = math.inf
    ranks = [{row["layer"]: row["rank"] for row in r.rows()} for r in (before, after)]
    moved = [Moved(key, ranks[0][key], ranks[1][key]) for key in keys if ranks[0][key] != ranks[1][key]]
    finite = np.isfinite(old) & np.isfinite(new)
    facts = [{**r.provenance, "device": r.device} for r in (before, after)]
    names = sorted({*facts[0], *facts[1]})
    return Verification(
        source=reference,
        device=after.device,
        bound=bound,
        groups=len(keys),
        identical=bool(same.all()),
        largest=float(relative.max()),
        layer=keys[int(relative.argmax())],
        spearman=float(spearman(old[None, finite], new[None, finite])[0]) if finite.sum() > 2 else math.nan,
        moved=tuple(sorted(moved, key=lambda m: -abs(m.after - m.before))),
        same=identity(after),
        changed={
            name: (facts[0].get(name, "none"), facts[1].get(name, "none"))
            for name in names
            if name.startswith(_VERSIONS) and facts[0].get(name) != facts[1].get(name)
        },
    )


def check(result: Verification) -> None:
    """Raises :class:`Differs` where a score differs by more than the bound."""
    if not result.passed:
        raise Differs(result.sentence)


def verify(
    reference: str,
    before: SensitivityResult,
    bound: float | None,
    device: str,
    configs: Path,
    output_root: Path,
    root: Path,
) -> tuple[Verification, Path]:
    """Runs a past run again and writes the comparison, with the new result under ``result``.

    Args:
        reference: Run id or path of the run.
        before: Its result.
        bound: Relative difference of a score that passes; ``None`` = :data:`BOUNDS` by device, that of a GPU where the
            run had another device.
        device: One of :data:`DEVICES`; ``recorded`` = the one that the run had.
        configs: Folder of the config groups.
        output_root: Where the folder goes.
        root: Project folder, for the git commit.

    Returns:
        The comparison and its folder.

    Raises:
        UserError: The run cannot be repeated, or the disk is full.
    """
    from layerbits.report import write_report
    from layerbits.stages.run import run

    where = before.device if device == "recorded" else device
    if bound is None:
        bound = BOUNDS[where if where == before.device else "cuda"]
    with tempfile.TemporaryDirectory(prefix="layerbits-verify-") as scratch:
        planned = plan_of_run(reference, before, where, configs, Path(scratch))
        (outcome,) = run(planned, root)
    result = compare(reference, before, outcome.result, bound)
    final = dated(output_root, f"verify_{before.run_name}")
    with whole_folder(final) as partial:
        write_report(outcome.result, partial / "result")
        write_json(partial / "verify.json", result.to_json())
        with optional_part("verify.md"):
            (partial / "verify.md").write_text(result.markdown(), "utf-8")
    return result, final


def bound_of(value: str) -> float | None:
    """The bound of a verification as users write it; ``None`` for ``auto``.

    Raises:
        UserError: It is no number from 0 on.
    """
    if value == "auto":
        return None
    try:
        bound = float(value)
    except ValueError:
        bound = -1.0
    if not 0 <= bound < math.inf:
        raise UserError(f"bound={value} is no relative difference; use auto, 0 or a number above")
    return bound
