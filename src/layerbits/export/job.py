"""Several schemes of one model exported one after the other, everything checked first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from layerbits.checkpoint.label import AUTO, FORMATS
from layerbits.errors import UserError, first_line
from layerbits.export.plan import ExportPlan, plan_exports
from layerbits.export.target import differences, find_target
from layerbits.paths import user_path
from layerbits.plain import Composed

if TYPE_CHECKING:
    from layerbits.export.scheme import Export
    from layerbits.schemes import Scheme

_NONE = (None, "", "none", "null")


@dataclass(frozen=True)
class ExportSettings:
    """What ``configs/export.yaml`` says beside the schemes.

    Attributes:
        root: Folder of the checkpoints; ``None`` = a new one.
        target: Generation of the GPU that will serve; ``None`` = not said.
        artifact_bytes: Checkpoints up to this size are logged as artifacts.
        register: Whether to register each in MLflow.
        registered_model: Name of the registered model; ``None`` = the model's.
    """

    root: Path | None
    output_root: Path
    format: str
    device: str
    target: str | None
    artifact_bytes: float
    register: bool
    registered_model: str | None

    @classmethod
    def from_config(cls, config: Composed) -> ExportSettings:
        """Reads a resolved configuration.

        Raises:
            UserError: A value is not one of its choices, or something is to be registered without tracking.
        """
        if config["format"] not in (*FORMATS, AUTO):
            raise UserError(f"format={config['format']} is not known; use {', '.join(FORMATS)} or {AUTO}")
        try:
            size = float(config["artifact_gb"]) * 1e9
        except (TypeError, ValueError):
            raise UserError(f"artifact_gb={config['artifact_gb']} is not a number of GB; use 0 for none") from None
        register = config["register"]
        if not isinstance(register, bool):
            raise UserError(f"register={register} is not known; use true or false")
        if register and not config["tracking"]["enabled"]:
            raise UserError("register=true needs a tracking store; leave out tracking=none")
        root, name = config["export_root"], config["registered_model"]
        return cls(
            root=None if root in _NONE else user_path(root),
            output_root=user_path(config["output_root"]),
            format=config["format"],
            device=config["device"],
            target=find_target(str(config["target"])),
            artifact_bytes=size,
            register=register,
            registered_model=None if name in _NONE else str(name),
        )

    def folder(self, model: str) -> Path:
        """Where the checkpoints of a model go."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        return self.root or self.output_root / "export" / f"{model}-{stamp}"


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
    plans, refused = plan_exports(schemes, root, settings.format)
    failed = {name: str(error) for name, error in refused.items()}
    if len(schemes) > 1:
        for name, words in failed.items():
            _say_failed(name, words)
    if settings.target is not None:
        for line in (line for plan in plans for line in differences(plan, settings.target)):
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
