"""What a run becomes: one row of plain values, with its groups as lists (Arrow's types, one schema)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa

from layerbits.candidates.kv_cache import KV_FORMATS
from layerbits.errors import UserError
from layerbits.history.source import RawRun, fetch
from layerbits.plain import JsonObject
from layerbits.tracking.contract import INTERVAL_COLUMNS, LAYER_COLUMNS, SCHEMA_VERSION, TABLE, read_layer_tags

_TEXT_PARAMS = (
    *("model", "model_revision", "quant_pair", "granularity", "format_name", "weight_precision"),
    *("activation_precision", "dataset", "dataset_size", "dataset_digest", "packing", "method", "engine", "dtype"),
    *("device", "config_hash"),
)
_COUNT_PARAMS = ("seq_len", "batch_size", "calib_samples", "score_samples", "seed", "vocabulary")
_METRICS = (
    *("effective_bits", "effective_bits_modelopt", "score_sum", "predicted_kl_sum", "score_chosen"),
    *("predicted_kl_chosen", "loss_per_token", "image_kl_share", "image_clipped"),
    *(f"kv_cache_{name}_predicted_kl" for name in KV_FORMATS),
)
_COUNTS = ("groups", "quantized_groups", "nonfinite", "not_believable", "image_tokens")
_TAGS = {
    "outcome": "outcome",
    "reason": "reason",
    "fp4_numerics": "fp4_numerics",
    "deployable": "deployable",
    "weights": "weights",
    "source": "source",
    "alias_of": "alias_of",
    "parent_run_id": "mlflow.parentRunId",
    "user": "mlflow.user",
    "git_commit": "git.commit",
    "layerbits_version": "version.layerbits",
}
_TIME = pa.timestamp("ms", tz="UTC")

RUN_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "run_name")),
        *((name, pa.string()) for name in _TEXT_PARAMS),
        *((name, pa.int64()) for name in _COUNT_PARAMS),
        ("target_effective_bits", pa.float64()),
        ("vision_bits", pa.float64()),
        *((name, pa.float64()) for name in _METRICS),
        *((name, pa.int64()) for name in _COUNTS),
        ("start_time", _TIME),
        ("end_time", _TIME),
        *((name, pa.string()) for name in ("status", *_TAGS)),
        ("schema_version", pa.int64()),
        *((name, pa.string()) for name in ("experiment_id", "artifact_uri")),
    ]
)
_TYPES = {"layer": pa.string(), "block": pa.int32(), "kind": pa.string(), "chosen": pa.bool_()}
_TYPES |= dict.fromkeys(("score", "predicted_kl", "low", "high", "image_share"), pa.float64())
_TYPES |= dict.fromkeys(("rank_low", "rank_high"), pa.int32())
LAYER_SCHEMA = pa.schema(
    [
        ("candidate", pa.string()),
        ("bits", pa.float64()),
        *((name, pa.list_(_TYPES[name])) for name in (*LAYER_COLUMNS, *INTERVAL_COLUMNS)),
    ]
)
"""A list per run and column; null where the run's groups are not known."""

SCHEMA = pa.schema([*RUN_SCHEMA, *LAYER_SCHEMA])


def row_of(run: RawRun) -> dict[str, object]:
    """A run as a row of :data:`SCHEMA`; what it does not have, or not as a number, is ``None``."""
    eff = {key.removeprefix("eff."): value for key, value in run.params.items() if key.startswith("eff.")}
    summary = {k.removeprefix("summary/"): v for k, v in run.metrics.items() if k.startswith("summary/")}
    return {
        "run_id": run.run_id,
        "run_name": run.info.get("run_name"),
        **{name: eff.get(name) for name in _TEXT_PARAMS},
        **{name: _number(int, eff.get(name)) for name in _COUNT_PARAMS},
        **{name: _number(float, eff.get(name)) for name in ("target_effective_bits", "vision_bits")},
        **{name: summary.get(name) for name in _METRICS},
        **{name: _number(int, summary.get(name)) for name in _COUNTS},
        "start_time": run.info.get("start_time"),
        "end_time": run.info.get("end_time"),
        "status": run.info.get("status"),
        **{name: run.tags.get(tag) for name, tag in _TAGS.items()},
        "schema_version": _number(int, run.tags.get("layerbits.schema_version")),
        "experiment_id": str(run.info["experiment_id"]),
        "artifact_uri": run.info.get("artifact_uri"),
        **_layers(run),
    }


def is_later(row: JsonObject) -> bool:
    """Whether a later LayerBits wrote it, whose names may mean something else."""
    return (row["schema_version"] or 0) > SCHEMA_VERSION


def with_table(uri: str, row: JsonObject) -> JsonObject:
    """The row with its groups, from the table among the artifacts where its tags do not have them.

    Raises:
        UserError: The table is missing or truncated, or there cannot be one.
    """
    if row["layer"] is not None:
        return row
    if is_later(row):
        raise UserError(f"schema_version {row['schema_version']}, written by a later LayerBits; upgrade layerbits")
    if row["outcome"] != "ok":
        raise UserError(f"outcome {row['outcome']}, so it has no scores")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.json"
        fetch(uri, row["artifact_uri"], TABLE, file)
        try:
            table = json.loads(file.read_bytes())
            at = {name: table["columns"].index(name) for name in (*LAYER_COLUMNS, "candidate", "bits")}
            at |= {name: table["columns"].index(name) for name in INTERVAL_COLUMNS if name in table["columns"]}
            columns = {name: [line[i] for line in table["data"]] for name, i in at.items()}
            columns |= {name: [None] * len(table["data"]) for name in INTERVAL_COLUMNS if name not in at}
            nan = {
                name: [float("nan") if v is None else float(v) for v in columns[name]]
                for name in ("score", "predicted_kl")
            }
            bits = columns["bits"][0]
            ends = {"candidate": str(columns["candidate"][0]), "bits": float("nan") if bits is None else float(bits)}
            whole = {**row, **columns, **nan, **ends}
            pa.Table.from_pylist([whole], schema=SCHEMA)
        except (ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as error:
            raise UserError(f"artifact {TABLE} is damaged ({error!r})") from None
    return whole


def _layers(run: RawRun) -> dict[str, object]:
    nothing: dict[str, object] = dict.fromkeys(LAYER_SCHEMA.names)
    if (_number(int, run.tags.get("layerbits.schema_version")) or 0) > SCHEMA_VERSION:
        return nothing
    try:
        return read_layer_tags(run.tags) or nothing
    except ValueError:
        return nothing  # the table among the artifacts has the same


def _number(kind: type[int] | type[float], value: str | float | None) -> int | float | None:
    try:
        return None if value is None else kind(value)
    except (ValueError, OverflowError):
        return None
