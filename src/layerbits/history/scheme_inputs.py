"""What schemes are made from, read: scores of runs or result folders, and factors of a probe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from layerbits.errors import UserError
from layerbits.history.derived import artifact
from layerbits.history.query import no_scores, result
from layerbits.history.source import connect, get_run, search
from layerbits.paths import names_file
from layerbits.plain import JsonObject
from layerbits.results.manifest import load_manifest
from layerbits.results.result import SensitivityResult
from layerbits.schemes.additivity import Factor, factors_of
from layerbits.schemes.budget_kinds import Measure
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import Source, combine


def load_scores(references: Sequence[str], tracking_uri: str | None = None) -> Source:
    """Reads the scores of finished runs.

    Args:
        references: Ids of sensitivity runs or of grids (all their finished cells), result folders, or manifests.
        tracking_uri: The store of the runs; as :func:`layerbits.history.result` takes it.

    Raises:
        UserError: An unknown or failed run, or runs whose scores do not compare.
    """
    if not references:
        raise UserError("no source is given; set run_id to the id of a sensitivity run, or to its folder")
    results: dict[str, SensitivityResult] = {}
    for reference in references:
        if names_file(reference):
            results[reference] = load_manifest(reference)
        else:
            results |= _from_store(reference, tracking_uri)
    return combine(results)


def load_factors(reference: str, tracking_uri: str | None, revision: str) -> list[Factor]:
    """The factors of a probe.

    Args:
        reference: Run id, folder or ``probe.json`` of a probe.
        tracking_uri: The store of the run.
        revision: Of the model that schemes are made for.

    Raises:
        UserError: There is no such probe, or as :func:`~layerbits.schemes.additivity.factors_of`.
    """
    if names_file(reference):
        probe = read_probe(reference)
    else:
        probe = json.loads(artifact(reference, "probe.json", tracking_uri))
    return factors_of(probe, reference, revision)


def read_probe(reference: str) -> JsonObject:
    """The record of a probe on disk.

    Args:
        reference: Folder or ``probe.json`` of a probe.

    Raises:
        UserError: There is no such probe.
    """
    path = Path(reference)
    path = path / "probe.json" if path.is_dir() else path
    try:
        probe: JsonObject = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no probe at {path}; give the folder of a probe, or its run id") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give the folder of a probe, or its run id") from None
    return probe


def requested_schemes(request: SchemeRequest, tracking_uri: str | None, measure: Measure) -> list[Scheme]:
    """The schemes of a request: those of its files, or made from its runs.

    Args:
        request: What is asked for.
        tracking_uri: The store of the runs.
        measure: Finds the bytes and seconds of schemes, where a budget counts them.

    Raises:
        UserError: No such file or run, or schemes that cannot be made of it.
    """
    settings = request.settings
    source = None if settings is None else load_scores(settings.references, tracking_uri)
    return request.schemes(measure, source)


def _from_store(run_id: str, tracking_uri: str | None) -> dict[str, SensitivityResult]:
    uri = connect(tracking_uri)
    run = get_run(uri, run_id)
    outcome = run.tags.get("outcome", "unfinished")
    cells = search(
        uri,
        str(run.info["experiment_id"]),
        f"tags.mlflow.parentRunId = '{run_id}' and tags.outcome = 'ok'",
        lambda child: "" if "layerbits.kind" in child.tags else child.run_id,
    )
    cells = [cell for cell in cells if cell]
    kind = run.tags.get("layerbits.kind")
    if kind is not None and not cells:
        raise UserError(no_scores(run_id, kind))
    if outcome not in ("ok", "partial") or (outcome == "partial" and not cells):
        why = f" ({run.tags['reason']})" if "reason" in run.tags else ""
        raise UserError(f"run {run_id} ended as {outcome}{why} and holds no scores; give a run whose outcome is ok")
    return {cell: result(cell, tracking_uri=uri) for cell in cells or [run_id]}
