"""Several schemes of one model exported one after the other, everything checked first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from layerbits.errors import UserError, first_line
from layerbits.export.plan import ExportPlan, plan_exports
from layerbits.export.settings import ExportSettings
from layerbits.export.target import differences, refused

if TYPE_CHECKING:
    from layerbits.export.scheme import Export
    from layerbits.schemes import Scheme


class ExportRuns(Protocol):
    """Where exports are logged."""

    def __call__(self, scheme: Scheme, export: Callable[[], Export]) -> None:
        """Exports a scheme and logs it."""

    def log_earlier(self, scheme: Scheme, folder: Path) -> None:
        """Logs what an earlier start of the same job has exported."""


def run_exports(schemes: Sequence[Scheme], settings: ExportSettings, log: ExportRuns) -> None:
    """Exports schemes; one that fails, or that quantizes nothing, does not keep the others from being exported.

    Those that an earlier start of the same job has exported and proven are left as they are.

    Args:
        schemes: Of one model and calibration.
        settings: Where to and how.
        log: Where they are logged.

    Raises:
        UserError: Something that was found before the first is exported, or at least one failed.
    """
    from layerbits.export.scheme import export_scheme, is_exported, known_exports, shared_ranges

    root = settings.folder(schemes[0].model.name if schemes else "")
    done = [s for s in schemes if is_exported(root / s.name, s, settings.format)]
    for scheme in done:
        log.log_earlier(scheme, root / scheme.name)
    schemes = [scheme for scheme in schemes if scheme not in done]
    if done and not schemes:
        return
    nothing = [scheme for scheme in schemes if not scheme.modules]
    if len(nothing) < len(schemes):
        for scheme in nothing:
            print(f"{scheme.name} quantizes nothing and has no checkpoint; give it fewer bits", flush=True)
        schemes = [scheme for scheme in schemes if scheme.modules]
    plans, impossible = plan_exports(schemes, root, settings.format)
    failed = {name: str(error) for name, error in impossible.items()}
    if len(schemes) > 1:
        for name, words in failed.items():
            _say_failed(name, words)
    for plan in plans:
        known = [] if settings.target is None else differences(plan, settings.target)
        for line in (*refused(plan), *known):
            print(f"warning: {line}", flush=True)
    ranges = shared_ranges(plans, settings.device) if plans else None
    for plan in plans:

        def export(plan: ExportPlan = plan) -> Export:
            return export_scheme(plan, settings.device, ranges, known_exports(plan.target.parent))

        try:
            log(plan.scheme, export)
        except UserError as error:
            failed[plan.scheme.name] = str(error)
            _say_failed(plan.scheme.name, str(error))
        except Exception as error:  # whatever a library makes of one scheme, the others are exported
            traceback.print_exc()
            failed[plan.scheme.name] = f"{type(error).__name__}: {first_line(error)}"
            _say_failed(plan.scheme.name, failed[plan.scheme.name])
    if len(failed) == 1 == len(schemes):
        raise UserError(next(iter(failed.values())))
    if failed:
        raise UserError(f"{len(failed)} of {len(schemes)} exports failed: {next(iter(failed.values()))}")


def _say_failed(name: str, words: str) -> None:
    print(f"\n{name} FAILED: {words}", flush=True)


def show(export: Export) -> None:
    """Prints the proof in a line, and where the checkpoint is."""
    print(f"\n{export.proof.summary}\ncheckpoint: {export.folder}\nreport: {export.report / 'proof.md'}", flush=True)
