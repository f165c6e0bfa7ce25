"""One sensitivity run: settings → result on disk. Knows nothing of MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from layerbits.candidates.candidate import Candidate, check_target, resolve_candidate
from layerbits.config import Settings
from layerbits.results.result import CandidateInfo, SensitivityResult
from layerbits.stages.plan import Plan
from layerbits.stages.run import run
from layerbits.stages.workbench import device_of, workbench
from layerbits.stages.write import write


def plan(settings: Settings) -> Plan:
    """Checks a run of one candidate before anything heavy is loaded.

    Raises:
        UserError: Whatever can be known to fail by now, with what to change.
    """
    candidate = candidate_of(settings)
    bench = workbench(settings)
    return bench.plan([(candidate, bench.check(candidate))])


def candidate_of(settings: Settings) -> Candidate:
    """What a run scores, checked as far as that goes without the model.

    Raises:
        UserError: There is no such device here, the pair, its format and the overlay do not go together, or the budget
            is out of reach.
    """
    device_of(settings.device)  # asks torch; a candidate asks ModelOpt
    candidate = resolve_candidate(settings.quant_pair, settings.overlay, settings.fp4, settings.experimental)
    check_target(candidate, settings.autoquant.effective_bits, settings.autoquant.vision_bits)
    return candidate


def sensitivity(
    settings: Settings, root: Path, about: Callable[[CandidateInfo], Sequence[str]] | None = None
) -> tuple[Path, SensitivityResult]:
    """Checks, scores and writes one candidate.

    Args:
        settings: Of the run.
        root: Project folder, for the git commit.
        about: What a reader should know of the candidate beforehand, a line each: said before the pass, and in the
            report.

    Returns:
        The result and its folder.

    Raises:
        UserError: As :func:`plan`, or the disk is full.
    """
    planned = plan(settings)
    ((candidate, capability),) = planned.candidates
    if about is not None:
        capability = replace(capability, notes=(*capability.notes, *about(candidate.info)))
        planned = replace(planned, candidates=((candidate, capability),))
    known = planned.warnings(capability)
    _warn(known)
    (outcome,) = run(planned, root)
    _warn(line for line in outcome.result.warnings if line not in known)
    return write(outcome, settings), outcome.result


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
