"""What a run's scores predict, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.jobs import note, run_job
from layerbits.paths import output_folder
from layerbits.plain import Composed
from layerbits.results.result import SensitivityResult
from layerbits.schemes.settings import one_run, source_name
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec
from layerbits.trust.reproduce import load_run
from layerbits.trust.settings import ValidateSettings

if TYPE_CHECKING:
    from layerbits.trust.validation import Validation


def validation(config: Composed, root: Path) -> None:
    """Reads the run, measures, writes and logs the result."""
    settings = ValidateSettings.from_config(config)
    reference = one_run(config["run_id"])
    output = output_folder("output_root", config["output_root"])

    def make(uri: str | None) -> Made:
        return _validated(reference, load_run(reference, uri), settings, output, root)

    name = f"validation of {source_name([reference])}"
    run_job(TrackingSpec.from_config(config), root, name, "validate", make, system_metrics=True)


def _validated(reference: str, run: SensitivityResult, settings: ValidateSettings, output: Path, root: Path) -> Made:
    from layerbits.trust.validate import validate, write_validation
    from layerbits.trust.validation import markdown

    result = validate(reference, run, settings, root / "configs", root)
    folder = write_validation(result, output)
    text = markdown(result)
    print(f"\n{text}\nvalidation: {folder}")
    tags = {**result.provenance, "source_run_id": reference, **note(text)}
    failure = UserError(f"{result.blind} ({folder})") if result.blind else None
    return Made(folder, result.metrics(), _parameters(result, settings), tags, failure)


def _parameters(result: Validation, settings: ValidateSettings) -> dict[str, str]:
    return {
        "eff.model": result.model.name,
        "eff.model_revision": result.model.revision,
        "eff.candidate": result.candidate,
        "eff.config_hash": result.config_hash,
        "eff.rows": str(result.data.rows),
        "eff.measured_dtype": result.dtype,
        "eff.disable_one": str(settings.disable_one).lower(),
        "eff.rankers": ",".join(one.name for one in result.predictions[1:]),
        "eff.kv_cache": "+".join(one.format for one in result.kv) or "none",
    }
