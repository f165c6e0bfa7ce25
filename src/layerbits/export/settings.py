"""What is asked of exports: ``configs/export.yaml`` beside the schemes, read and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from layerbits.checkpoint.label import AUTO, FORMATS
from layerbits.errors import UserError
from layerbits.export.target import find_target
from layerbits.paths import output_folder
from layerbits.plain import Composed, flag, unset
from layerbits.scoring.settings import check_device
from layerbits.tracking.registry import check_name


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
            UserError: A value is not one of its choices, or something is to be registered without tracking or under a
                name that MLflow does not take.
        """
        if config["format"] not in (*FORMATS, AUTO):
            raise UserError(f"format={config['format']} is not known; use {', '.join(FORMATS)} or {AUTO}")
        try:
            size = float(config["artifact_gb"]) * 1e9
        except (TypeError, ValueError):
            size = math.nan
        if not size >= 0:
            raise UserError(f"artifact_gb={config['artifact_gb']} is not a number of GB; use 0 for none")
        register = flag("register", config["register"])
        if register and not config["tracking"]["enabled"]:
            raise UserError("register=true needs a tracking store; leave out tracking=none")
        root, name = config["export_root"], config["registered_model"]
        if register and not unset(name):
            check_name(str(name))
        return cls(
            root=None if unset(root) else output_folder("export_root", root),
            output_root=output_folder("output_root", config["output_root"]),
            format=config["format"],
            device=check_device(config["device"]),
            target=find_target(str(config["target"])),
            artifact_bytes=size,
            register=register,
            registered_model=None if unset(name) else str(name),
        )

    def folder(self, model: str) -> Path:
        """Where the checkpoints of a model go."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        return self.root or self.output_root / "export" / f"{model}-{stamp}"

    def check_registered(self, model: str) -> None:
        """Checks the name to register checkpoints of a model under, before anything is exported.

        Raises:
            UserError: MLflow does not take it.
        """
        if self.register:
            check_name(self.registered_model or model)
