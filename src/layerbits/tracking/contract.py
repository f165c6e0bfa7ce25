"""What a result becomes in MLflow: names and values, no MLflow (the contract is ``docs/tracking.md``)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from layerbits.atomic import optional_part
from layerbits.plain import JsonMapping
from layerbits.results.kv_cache import kv_lines, kv_sums
from layerbits.results.result import CalibrationInfo, SensitivityResult, by_kind
from layerbits.results.routing import coverage
from layerbits.tracking.colors import color

Number = TypeVar("Number", int, float)

SCHEMA_VERSION = 1
RESULT_ID = "layerbits.result_id"
RECORD_ID = "layerbits.record_id"
"""The same for what was made from earlier runs: the digest of its ``run.json``."""

TABLE = "sensitivity/layer_sensitivity.json"
LAYERS = "mlflow.layerbits.layers."
"""Prefix of the tags that hold the scores per group, a number follows; the UI hides what starts with ``mlflow.``."""

SUMMARY = "mlflow.layerbits.summary"
"""Tag with the ``summary/…`` metrics as JSON, so that history need not ask for all metrics of a run."""

DIGEST_TAG = "mlflow.layerbits.scheme."
"""Prefix of the tags with a scheme's digest, hidden likewise."""

VERDICT_TAG = "mlflow.layerbits.verdict."
"""Prefix of the tags of an evaluation with what it says of a scheme, hidden likewise."""

IDENTITY_TAG = "layerbits_digest"
"""Tag of a logged model: digest of the scheme, or of the unquantized model (name and revision)."""

EXTERNAL_TAG = "mlflow.model.isExternal"
"""Tag by which MLflow itself says that a logged model's files lie elsewhere."""

PROCESS = "mlflow.layerbits.process."
"""Prefix of the tags that name the process of a run, hidden likewise."""

STATUS = {"ok": "FINISHED", "skipped": "FINISHED", "killed": "KILLED"}
"""MLflow's status of a run with an ``outcome``; FAILED for all others."""

LAYER_COLUMNS = ("layer", "block", "kind", "score", "predicted_kl", "chosen")
"""What those tags have a list of, most sensitive group first."""

INTERVAL_COLUMNS = ("low", "high", "rank_low", "rank_high", "image_share")
"""Further lists, where intervals of the predicted KL and of the rank are known, and where rows had pictures."""

_TAG_LENGTH = 5000  # MLflow 3.17 takes 8000 characters, earlier servers 5000
_MOST_BYTES = 1 << 26  # what a server may make us unpack


def parameters(result: SensitivityResult) -> dict[str, str]:
    """Parameters in force, under ``eff.`` so that they never collide with what ``mlflow run`` logs as typed.

    What an imported result does not say is left out.
    """
    info, data = result.candidate, result.calibration
    values = {
        "model": result.model.name,
        "model_revision": result.model.revision,
        "weight_precision": info.weight_precision,
        "activation_precision": info.activation_precision,
        "quant_pair": info.quant_pair,
        "format_name": info.format_name,
        "granularity": info.granularity,
        "config_hash": info.config_hash,
        "dataset": data.dataset,
        "dataset_size": data.size,
        "dataset_digest": data.digest,
        "packing": data.packing,
        "seq_len": data.seq_len,
        "batch_size": data.batch_size,
        "calib_samples": data.calib_samples,
        "score_samples": data.score_samples,
        "method": result.method,
        "draws": _draws(result),
        "engine": result.engine,
        "target_effective_bits": result.allocation.target_bits,
        "vision_bits": result.allocation.vision_bits,
        "cost_model": result.allocation.cost_model,
        "seed": result.seed,
        "exclude": ",".join(result.settings.get("model", {}).get("exclude") or ()),
        "vocabulary": result.baseline.vocabulary if result.baseline else None,
        "dtype": result.model.dtype,
        "device": result.device,
    }
    known = {name: value for name, value in values.items() if value not in ("", None) and value == value}
    return {f"eff.{name}": str(value) for name, value in known.items()}


def _draws(result: SensitivityResult) -> object:
    """Draws of the fisher method; other methods have none."""
    return result.settings.get("autoquant", {}).get("draws", "") if result.method == "fisher" else ""


def metrics(result: SensitivityResult) -> list[tuple[str, float, int]]:
    """All metrics as (key, value, step), non-finite values left out.

    The step of a ``*_by_layer`` metric is the block; where a block has several groups of one kind, they are summed. A
    predicted KL that is not believable is left out of ``predicted_kl_by_layer``, which is there to be drawn.
    """
    kinds = ("scores", "score_by_layer"), ("predicted_kl", "predicted_kl_by_layer")
    rows = [(key, value, 0) for key, value in _scalars(result)]
    for values, prefix in kinds:
        rows += [(f"{prefix}/{kind}", value, block) for kind, block, value in _lines(result, values)]
    if (parts := result.modality) is not None:
        column = np.where(result.beyond, np.nan, result.predicted_kl)
        for block, (images, words) in parts.by_block(result.groups, column).items():
            rows += [("modality_by_layer/images", images, block), ("modality_by_layer/words", words, block)]
    for what in ("score", "predicted_kl"):
        rows += [(f"{what}_by_layer/kv_{form}", v, block) for form, block, v in kv_lines(result.kv_cache, what)]
    return [row for row in rows if math.isfinite(row[1])]


def tags(result: SensitivityResult) -> dict[str, str]:
    """Facts about where and how, and what MLflow's UI shows a run by."""
    info = result.candidate
    pair = info.quant_pair or f"w{info.weight_precision}_a{info.activation_precision}"
    return {
        **result.provenance,
        **result.tags,
        **layer_tags(result),
        SUMMARY: json.dumps({key: value for key, value, _ in metrics(result) if key.startswith("summary/")}),
        "layerbits.schema_version": str(SCHEMA_VERSION),
        **({"config_hash": info.config_hash} if info.config_hash else {}),
        "warnings": str(len(result.warnings)),
        "outcome": "ok",
        **_note(result),
        "mlflow.runColor": color(pair, info.granularity or "default"),
        # What mlflow.log_table would set; it rounds to ten decimals, and raw scores reach far below.
        "mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}]),
    }


def _note(result: SensitivityResult) -> dict[str, str]:
    from layerbits.report import note

    with optional_part("the description of the run"):
        return {"mlflow.note.content": note(result)}
    return {}


def layer_tags(result: SensitivityResult) -> dict[str, str]:
    """Scores and choice per group with all their digits, for a search to return in a tag or two.

    As metrics, the predicted KL alone would make every search of the store half as slow again. Strict JSON (null where
    a number is not finite), compressed with zlib, in base64, cut into tags.
    """
    rows = sorted(result.rows(), key=lambda row: row["rank"])
    info = result.candidate
    names = (*LAYER_COLUMNS, *(name for name in INTERVAL_COLUMNS if name in rows[0]))
    columns = {name: [_cell(row[name]) for row in rows] for name in names}
    columns["chosen"] = [None if row["chosen"] is None else int(row["chosen"]) for row in rows]
    ends = {"candidate": info.name, "bits": _cell(info.bits)}
    plain = json.dumps({**ends, **columns}, separators=(",", ":"), allow_nan=False)
    text = base64.b64encode(zlib.compress(plain.encode(), 9)).decode()
    return {f"{LAYERS}{i}": text[at : at + _TAG_LENGTH] for i, at in enumerate(range(0, len(text), _TAG_LENGTH))}


def read_layer_tags(tags: Mapping[str, str]) -> dict[str, object] | None:
    """What :func:`layer_tags` wrote: ``candidate``, ``bits`` and a list for each of :data:`LAYER_COLUMNS`.

    And for each of :data:`INTERVAL_COLUMNS`, ``None`` where it is not known.

    Returns:
        ``None`` where the run has no such tags.

    Raises:
        ValueError: A part is missing or damaged.
    """
    parts = sorted((key for key in tags if key.startswith(LAYERS)), key=lambda key: int(key.removeprefix(LAYERS)))
    if not parts:
        return None
    try:
        packed = base64.b64decode("".join(tags[key] for key in parts), validate=True)
        unpack = zlib.decompressobj()
        plain = json.loads(unpack.decompress(packed, _MOST_BYTES))
        intervals = {name: plain.get(name) or [None] * len(plain["layer"]) for name in INTERVAL_COLUMNS}
        lengths = {len(column) for column in (*(plain[name] for name in LAYER_COLUMNS), *intervals.values())}
        if not unpack.eof or len(lengths) != 1:
            raise ValueError("cut off")
        return {"candidate": str(plain["candidate"]), "bits": _number(plain["bits"])} | {
            "layer": [str(name) for name in plain["layer"]],
            "block": [None if block is None else int(block) for block in plain["block"]],
            "kind": [str(kind) for kind in plain["kind"]],
            "score": [_number(value) for value in plain["score"]],
            "predicted_kl": [_number(value) for value in plain["predicted_kl"]],
            "chosen": [None if flag is None else bool(flag) for flag in plain["chosen"]],
            "low": [_optional(float, value) for value in intervals["low"]],
            "high": [_optional(float, value) for value in intervals["high"]],
            "rank_low": [_optional(int, value) for value in intervals["rank_low"]],
            "rank_high": [_optional(int, value) for value in intervals["rank_high"]],
            "image_share": [_optional(float, value) for value in intervals["image_share"]],
        }
    except (binascii.Error, zlib.error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"damaged ({error!r})") from None


def table(result: SensitivityResult) -> str:
    """The scores per group in the JSON that ``mlflow.load_table`` and the UI read."""
    rows = result.rows()
    columns = list(rows[0])
    data = [[_cell(row[name]) for name in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}, allow_nan=False)


def dataset(result: SensitivityResult) -> dict[str, str] | None:
    """The captions as the fields of an MLflow dataset: named and counted, not carried along.

    ``None`` where they cannot be told from others, as in an imported result.
    """
    return calibration_data(result.calibration)


def calibration_data(data: CalibrationInfo) -> dict[str, str] | None:
    """As :func:`dataset`, of what a result was scored on."""
    if not data.digest:
        return None
    profile = {
        "captions": data.calib_samples,
        "packing": data.packing,
        "seq_len": data.seq_len,
        "calib_rows": data.calib_rows,
        "score_rows": data.score_rows,
        "loss_tokens": data.loss_tokens,
    }
    return {
        "name": f"{data.dataset}-{data.size}",
        "digest": data.digest[:36],  # as long as MLflow takes it; eff.dataset_digest has all of it
        "source_type": "code",
        "source": json.dumps({"tags": {"dataset": data.dataset, "size": data.size, "digest": data.digest}}),
        "schema": json.dumps({"mlflow_colspec": [{"type": "string", "name": "caption", "required": True}]}),
        "profile": json.dumps(profile),
    }


def held_out_data(dataset: str, facts: JsonMapping) -> dict[str, str]:
    """Held-out captions as the fields of an MLflow dataset.

    Args:
        dataset: Name of the dataset that they were held out from.
        facts: What tells them from other rows of it: how many, how long, their digest.
    """
    said = json.dumps(facts, sort_keys=True)
    return {
        "name": f"{dataset}-held-out",
        "digest": hashlib.sha256(f"{dataset} {said}".encode()).hexdigest()[:36],  # as long as MLflow takes it
        "source_type": "code",
        "source": json.dumps({"tags": {"dataset": dataset}}),
        "schema": json.dumps({"mlflow_colspec": [{"type": "string", "name": "caption", "required": True}]}),
        "profile": said,
    }


def digests(schemes: Mapping[str, str]) -> dict[str, str]:
    """Tags that say what each scheme of a run is: its name may mean another one in another run.

    Args:
        schemes: Name → digest.
    """
    return {f"{DIGEST_TAG}{name}": digest for name, digest in schemes.items()}


def result_id(directory: Path) -> str:
    """What tells a result from every other: the digest of its manifest."""
    return hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()[:32]


def milliseconds(result: SensitivityResult) -> int:
    """When the result was made, in Unix milliseconds; now where it does not say."""
    try:
        return int(datetime.fromisoformat(result.created).timestamp() * 1000)
    except ValueError:
        return int(time.time() * 1000)


def _scalars(result: SensitivityResult) -> Iterator[tuple[str, float]]:
    allocation = result.allocation
    yield "summary/effective_bits", allocation.effective_bits
    yield "summary/effective_bits_modelopt", allocation.effective_bits_modelopt
    yield "summary/effective_bits_active", allocation.effective_bits_active
    for seen in coverage(result.routing):
        for name in ("unseen", "starved", "least", "median"):
            yield f"experts/{seen.phase}/{name}", float(getattr(seen, name))
    yield "summary/score_sum", result.total("scores")
    if known := not np.isnan(result.predicted_kl).all():
        yield "summary/predicted_kl_sum", result.total("predicted_kl")
    yield "summary/score_chosen", allocation.score
    if assignment := allocation.assignment:
        chosen_kl = [k for k, c in zip(result.predicted_kl, assignment, strict=True) if c is not None]
        yield "summary/predicted_kl_chosen", float(sum(chosen_kl))
        yield "summary/quantized_groups", float(assignment.quantized)
    yield "summary/groups", float(len(result.groups))
    finite = np.isfinite(result.scores) & (np.isfinite(result.predicted_kl) if known else True)
    yield "summary/nonfinite", float((~finite).sum())
    for form, kl in kv_sums(result.kv_cache).items():
        yield f"summary/kv_cache_{form}_predicted_kl", kl
    if (parts := result.modality) is not None:
        yield "summary/image_tokens", float(parts.image_tokens)
        yield "summary/image_kl_share", parts.whole(result.predicted_kl)
        yield "summary/image_clipped", parts.clipped
    if result.baseline is not None:
        yield "summary/loss_per_token", result.baseline.loss_per_token
        yield "summary/not_believable", float(result.beyond.sum())
    if result.measured_se is not None:
        yield "summary/measured_groups", float(np.isfinite(result.measured_se).sum())
    if (ends := result.intervals) is not None:
        yield f"summary/rank_stability_top{ends.top}", ends.top_overlap / ends.top
        yield f"summary/captions_for_stable_top{ends.top}", ends.top_captions
    for kind, share in result.shares().items():
        yield f"share/{kind}", share
    for group, score in zip(result.groups, result.scores, strict=True):
        yield f"score/{group.key}", float(score)
    for phase, seconds in result.seconds.items():
        yield f"seconds/{phase}", seconds
    for what, gigabytes in result.memory.items():
        yield f"memory/{what}", gigabytes


def _lines(result: SensitivityResult, values: str) -> Iterator[tuple[str, int, float]]:
    column = getattr(result, values)
    if values == "predicted_kl":
        column = np.where(result.beyond, np.nan, column)
    for kind, positions in by_kind(result.groups):
        blocks: dict[int, float] = {}
        for position in positions:
            block = result.groups[position].block
            if block is not None:
                blocks[block] = blocks.get(block, 0.0) + float(column[position])
        yield from ((kind, block, value) for block, value in sorted(blocks.items()))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return ", ".join(value) if isinstance(value, list) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _optional(kind: type[Number], value: float | None) -> Number | None:
    return None if value is None else kind(value)
