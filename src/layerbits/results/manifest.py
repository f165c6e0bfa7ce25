"""A result as a manifest and its per-sample scores as a frame, written and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.errors import UserError
from layerbits.paths import home_path, names_file
from layerbits.plain import JsonMapping, JsonObject, finite_object
from layerbits.results.assignment import Assignment
from layerbits.results.baseline import BaselineLoss
from layerbits.results.intervals import Intervals
from layerbits.results.kv_cache import kv_from_json
from layerbits.results.modality import Modality
from layerbits.results.result import (
    Allocation,
    CalibrationInfo,
    CandidateInfo,
    Group,
    ModelInfo,
    NonFinite,
    SensitivityResult,
)
from layerbits.results.routing import Routing

if TYPE_CHECKING:
    import pandas as pd


SCHEMA_VERSION = 1


def to_manifest(result: SensitivityResult) -> dict[str, object]:
    """Plain JSON data of everything but the per-sample scores, with its schema version."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": result.created,
        "model": asdict(result.model),
        "calibration": finite_object(asdict(result.calibration)),
        "method": result.method,
        "engine": result.engine,
        "seed": result.seed,
        "device": result.device,
        "candidates": [finite_object(asdict(result.candidate))],
        "groups": [asdict(g) for g in result.groups],
        "recipe": allocation_json(result.allocation),
        "intervals": result.intervals.to_json(result.candidate.name) if result.intervals else None,
        "baseline": finite_object(asdict(result.baseline)) if result.baseline else None,
        "layers": [finite_object(row) for row in result.rows()],
        "nonfinite": [asdict(n) for n in result.nonfinite],
        "settings": dict(result.settings),
        "provenance": dict(result.provenance),
        "seconds": dict(result.seconds),
        "memory": dict(result.memory),
        "routing": [asdict(r) for r in result.routing],
        "kv_cache": [asdict(s) for s in result.kv_cache],
        **({"modality": result.modality.to_json()} if result.modality else {}),
        "tags": dict(result.tags),
        "warnings": list(result.warnings),
    }


def from_manifest(data: JsonMapping) -> SensitivityResult:
    """Reads :func:`to_manifest`'s data back (without per-sample scores).

    Raises:
        UserError: Not a LayerBits manifest, one of a later schema, or one of several candidates.
    """
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if not isinstance(version, int):
        raise UserError("not a LayerBits manifest: it has no schema_version; give the manifest.json of a run")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"manifest has schema_version {version}, this LayerBits reads up to {SCHEMA_VERSION}; upgrade layerbits"
        )
    try:
        groups = tuple(Group(**{**g, "modules": tuple(g["modules"])}) for g in data["groups"])
        if len(data["candidates"]) != 1:
            raise UserError(f"manifest has {len(data['candidates'])} candidates, a run has one; score them again")
        (candidate,) = (
            CandidateInfo(**{**_numbers(c, "bits", "bits_modelopt"), "adjustments": tuple(c["adjustments"])})
            for c in data["candidates"]
        )
        row_of = {g.key: i for i, g in enumerate(groups)}
        scores = np.full(len(groups), np.nan)
        predicted_kl, measured_se = np.full_like(scores, np.nan), np.full_like(scores, np.nan)
        for layer in data["layers"]:
            at = row_of[layer["layer"]]
            scores[at] = np.nan if layer["score"] is None else layer["score"]
            predicted_kl[at] = np.nan if layer["predicted_kl"] is None else layer["predicted_kl"]
            measured_se[at] = np.nan if layer.get("measured_se") is None else layer["measured_se"]
        calibration = _numbers(data["calibration"], "padding_share")
        calibration["batch_loss_tokens"] = tuple(calibration["batch_loss_tokens"])
        return SensitivityResult(
            model=ModelInfo(**data["model"]),
            calibration=CalibrationInfo(**calibration),
            method=data["method"],
            engine=data["engine"],
            seed=data["seed"],
            device=data["device"],
            groups=groups,
            candidate=candidate,
            scores=scores,
            predicted_kl=predicted_kl,
            allocation=_allocation(data["recipe"]),
            baseline=BaselineLoss(**_numbers(measured, "loss_per_token"))
            if (measured := data.get("baseline"))
            else None,
            intervals=Intervals.from_json(data.get("intervals"), candidate.name, data["layers"], row_of),
            nonfinite=tuple(NonFinite(**n) for n in data["nonfinite"]),
            settings=data["settings"],
            provenance=data["provenance"],
            seconds=data["seconds"],
            memory=data["memory"],
            routing=tuple(
                Routing(r["group"], r["block"], tuple(r["calibration"]), tuple(r["scoring"]))
                for r in data.get("routing", ())
            ),
            kv_cache=kv_from_json(data.get("kv_cache", ())),
            measured_se=measured_se if any("measured_se" in layer for layer in data["layers"]) else None,
            modality=Modality.from_json(data.get("modality")),
            tags=data["tags"],
            warnings=tuple(data["warnings"]),
            created=data["created"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"manifest is damaged ({error!r}); fetch it again or run the job again") from error


def sample_frame(result: SensitivityResult) -> pd.DataFrame:
    """Long pandas frame of the per-sample scores: sample, tokens, layer, candidate, predicted_kl.

    Raises:
        ValueError: The engine kept no per-sample scores.
    """
    import pandas as pd

    if result.sample_kl is None or result.sample_tokens is None:
        raise ValueError("this result holds no per-sample scores")
    index = np.indices(result.sample_kl.shape).reshape(2, -1)
    return pd.DataFrame(
        {
            "sample": index[0].astype(np.int32),
            "tokens": result.sample_tokens[index[0]].astype(np.int32),
            "layer": pd.Categorical.from_codes(index[1], [g.key for g in result.groups]),
            "candidate": pd.Categorical.from_codes(np.zeros_like(index[0]), [result.candidate.name]),
            "predicted_kl": result.sample_kl.reshape(-1).astype(np.float32),
        }
    )


def with_samples(result: SensitivityResult, frame: pd.DataFrame) -> SensitivityResult:
    """The result with the per-sample scores of :func:`sample_frame` put back."""
    samples = int(frame["sample"].max()) + 1
    sample_kl = np.zeros((samples, len(result.groups)))
    rows = frame["layer"].map({g.key: i for i, g in enumerate(result.groups)}).to_numpy(dtype=np.int64)
    at = frame["sample"].to_numpy()
    sample_kl[at, rows] = frame["predicted_kl"].to_numpy()
    tokens = np.zeros(samples, dtype=np.int64)
    tokens[at] = frame["tokens"].to_numpy()
    return replace(result, sample_kl=sample_kl, sample_tokens=tokens)


def load_manifest(path: str | Path) -> SensitivityResult:
    """Reads a ``manifest.json`` and the ``sensitivity/scores.parquet`` beside it where there is one.

    Raises:
        UserError: No such file, not JSON, or not a manifest that this version reads.
    """
    path, result = _read(path)
    samples = path.parent / "sensitivity" / "scores.parquet"
    if samples.exists():
        import pandas as pd

        result = with_samples(result, pd.read_parquet(samples))
    return result


def check_manifests(references: Sequence[str]) -> None:
    """Checks the results among references that are given by their files, before a store is asked for the others.

    Args:
        references: Run ids, result folders or manifests.

    Raises:
        UserError: As :func:`load_manifest`.
    """
    for reference in references:
        if names_file(reference):
            _read(reference)


def _read(path: str | Path) -> tuple[Path, SensitivityResult]:
    """A manifest's file, and what it says."""
    path = home_path(path)
    if path.is_dir():
        path = path / "manifest.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no manifest at {path}; give the manifest.json of a finished run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); give the manifest.json of a finished run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the manifest.json of a finished run") from None
    return path, from_manifest(data)


def allocation_json(allocation: Allocation) -> JsonObject:
    """An allocation as a manifest has it: ``chosen`` for its assignment, ``vision_bits`` where there are any."""
    return {
        "chosen" if name == "assignment" else name: value
        for name, value in finite_object(asdict(allocation)).items()
        if name != "vision_bits" or value is not None
    }


def _allocation(data: JsonMapping) -> Allocation:
    values = {"effective_bits_active": None, **data}  # earlier versions did not say it
    assignment = Assignment(values.pop("chosen"))
    names = ("target_bits", "effective_bits", "effective_bits_modelopt", "effective_bits_active", "score")
    return Allocation(assignment=assignment, **_numbers(values, *names))


def _numbers(values: JsonMapping, *names: str) -> JsonObject:
    """The values of :func:`~layerbits.plain.finite_object` with NaN for those numbers that it left out."""
    return {**values, **{name: math.nan for name in names if values[name] is None}}
