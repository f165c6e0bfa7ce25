"""A past run, found again by its record, and the plan that repeats it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.paths import names_file
from layerbits.results.comparable import REPETITION, facts, reasons
from layerbits.results.experiment import made_by
from layerbits.results.manifest import load_manifest
from layerbits.results.result import SensitivityResult

if TYPE_CHECKING:
    from layerbits.stages.plan import Plan


_WORDS = {"model_revision": "model revision", "dataset_digest": "captions", "config_hash": "configuration"}


def load_run(reference: str, tracking_uri: str | None) -> SensitivityResult:
    """The result of a run id, a result folder or a manifest, or of the run whose scores are behind a checkpoint.

    Raises:
        UserError: There is no such run, or it does not say how it was made.
    """
    reference = scored_run(reference, tracking_uri)
    if names_file(reference):
        result = load_manifest(reference)
    else:
        from layerbits import history

        result = history.result(reference, tracking_uri=tracking_uri)
    if "model" not in result.settings:
        raise UserError(f"{reference} does not say how it was made (an imported run?); give a run of our own")
    return result


def scored_run(reference: str, tracking_uri: str | None) -> str:
    """The sensitivity run behind a checkpoint's folder, found through the run that made it; else ``reference``.

    Raises:
        UserError: Several runs are behind it, or the export's run cannot be read.
    """
    made = made_by(Path(reference)) if Path(reference).is_dir() else None
    if made is None:
        return reference
    from layerbits.history.source import connect, get_run

    source_ids = get_run(connect(tracking_uri), made.run_id).tags.get("source_run_id", "")
    runs = [run for run in source_ids.split(",") if run]
    if len(runs) != 1:
        raise UserError(f"{reference} was exported by {made} from {len(runs)} runs; give one of them: {source_ids}")
    return runs[0]


def plan_of_run(
    reference: str, result: SensitivityResult, device: str, configs: Path, checkpoint: Path | None = None
) -> Plan:
    """The plan of a past run.

    Args:
        reference: Run id or path.
        result: Its result.
        device: ``auto``, ``cpu`` or ``cuda``.
        configs: Folder of the config groups.
        checkpoint: Folder for the search checkpoint, where the run is scored again; an empty one, for steps kept from
            the run itself would prove nothing.

    Raises:
        UserError: Model, captions or effective configuration are not those that were scored, or there is no such
            device here.
    """
    from layerbits.config import Settings
    from layerbits.grid import Cell, cell_settings
    from layerbits.sensitivity import plan

    info = result.candidate
    if recipe := result.tags.get("recipe"):
        raise UserError(f"{reference} is one format of recipe {recipe}; run the recipe again, and compare the two runs")
    cell = Cell(info.quant_pair, info.granularity, result.calibration.size)
    composed = cell_settings(result.settings, cell, configs)
    settings = Settings.from_config(composed)
    autoquant = replace(settings.autoquant, checkpoint=str(checkpoint) if checkpoint else None)
    planned = plan(replace(settings, device=device, autoquant=autoquant))
    ((candidate, _),) = planned.candidates
    now = {
        "model_revision": planned.resolved.revision,
        "dataset_digest": planned.captions.digest,
        "config_hash": candidate.info.config_hash,
    }
    why = reasons(facts(result), now, REPETITION)
    changed = [f"{_WORDS[difference.name]} (was {difference.a}, is {difference.b})" for difference in why]
    if changed:
        raise UserError(
            f"{reference} cannot be repeated, for this has changed since: {', '.join(changed)}; restore it, or score "
            "anew and compare the two runs"
        )
    return planned


def identity(result: SensitivityResult) -> dict[str, str]:
    """What is the same in two runs that are the same measurement."""
    known = facts(result)
    return {_WORDS[name]: str(known[name]) for name in REPETITION.same}
