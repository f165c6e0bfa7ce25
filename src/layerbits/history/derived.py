"""What was made from sensitivity runs: schemes and probes, a row per scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from layerbits.history.evaluated import verdicts
from layerbits.history.source import RawRun, connect, experiment_id, fetch, get_run, search, store_errors
from layerbits.plain import JsonObject
from layerbits.tracking.contract import DIGEST_TAG

_STEP = re.compile(r"speed/batch_(\d+)/decode_ms")
_PREFIXES = {"schemes": "scheme/", "probe": "probe/"}
_SERVED = ("served_kl", "served_gib", "decode_ms", "prefill_tokens_per_second")
_FACTS = ("run_id", "run_name", "source_run_id", "model", "start_time", "kv_cache", "scheme", *_SERVED, "answers")


def schemes(experiment: str = "layerbits", *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The schemes that finished runs made, latest run first.

    Returns:
        A row per run and scheme: ``run_id``, ``run_name``, ``source_run_id`` (several separated by commas), ``model``,
        ``start_time`` in UTC, ``kv_cache`` of the run's schemes, ``scheme``, ``served_kl`` (nats per token, as the
        latest serve check of the same scheme in the experiment measured it in a runtime; NaN without one),
        ``served_gib`` (weights in vLLM), ``decode_ms`` (a decode step at the smallest batch) and
        ``prefill_tokens_per_second`` (prompt tokens at that batch) likewise, ``answers``
        (the verdict of the latest evaluation of the same scheme, in words; missing without one), and the
        numbers that were logged of it (``bits``, ``score``, ``predicted_kl``, ``kv_predicted_kl``, ``gib`` where a
        budget counted it, ``ms`` where a table of costs was named, …), missing where a run has none. Without rows where
        no such run exists.

    Raises:
        UserError: The store cannot be read, or there is no such experiment.
    """
    return _derived("schemes", experiment, tracking_uri)


def probes(experiment: str = "layerbits", *, tracking_uri: str | None = None) -> pd.DataFrame:
    """What finished probes measured, as :func:`schemes`.

    The numbers are ``bits``, ``predicted_kl``, ``kl`` (measured, nats per token), ``perplexity``, …; the rows
    ``unquantized`` and ``floor`` are the model itself and the noise floor.

    Raises:
        UserError: As :func:`schemes`.
    """
    return _derived("probe", experiment, tracking_uri)


def artifact(run_id: str, name: str, tracking_uri: str | None = None) -> str:
    """The text of an artifact of a run.

    Raises:
        UserError: There is no such run, or it has no such artifact.
    """
    uri = connect(tracking_uri)
    run = get_run(uri, run_id)
    with TemporaryDirectory() as folder:
        target = Path(folder) / Path(name).name
        fetch(uri, str(run.info["artifact_uri"]), name, target)
        return target.read_text("utf-8")


def _derived(kind: str, experiment: str, tracking_uri: str | None) -> pd.DataFrame:
    uri = connect(tracking_uri)
    condition = f"tags.`layerbits.kind` = '{kind}' AND attributes.status = 'FINISHED'"
    with store_errors(uri):
        where = experiment_id(uri, experiment)
        runs = search(uri, where, condition, lambda run: scheme_rows(run, _PREFIXES[kind]))
        served, said = (_served(uri, where), verdicts(uri, where)) if runs else ({}, {})
    rows = [
        {
            **dict.fromkeys(_SERVED),
            **row,
            **served.get(digest or "", {}),
            "answers": said.get(digest or ""),
        }
        for part in reversed(runs)
        for digest, row in part
    ]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*_FACTS, *(name for row in rows for name in row)])))
    frame[list(_SERVED)] = frame[list(_SERVED)].astype(float)
    frame["start_time"] = pd.to_datetime(frame["start_time"], unit="ms", utc=True)
    return frame


def scheme_rows(run: RawRun, prefix: str) -> list[tuple[str | None, JsonObject]]:
    """The digest of each scheme of a run, and its row."""
    rows: dict[str, JsonObject] = {}
    for key, value in run.metrics.items():
        scheme, _, number = key.removeprefix(prefix).rpartition("/")
        if key.startswith(prefix) and scheme:
            rows.setdefault(scheme, {})[number] = value
    facts = {**run.facts, "kv_cache": run.params.get("eff.kv_cache")}
    return [
        (run.tags.get(f"{DIGEST_TAG}{scheme}"), {**facts, "scheme": scheme, **numbers})
        for scheme, numbers in sorted(rows.items())
    ]


def _served(uri: str, experiment: str) -> dict[str, dict[str, float]]:
    """Digest of a scheme → what the latest serve checks that ended well measured of it in a runtime."""
    condition = "tags.`layerbits.kind` = 'serve_check' AND tags.outcome = 'ok'"
    served: dict[str, dict[str, float]] = {}
    for digest, measured in search(uri, experiment, condition, _measured):
        if digest is not None:
            served.setdefault(digest, {}).update(measured)
    return served


def _measured(run: RawRun) -> tuple[str | None, dict[str, float]]:
    return run.params.get("eff.scheme_digest"), served_values(run.metrics)


def served_values(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a serve check measured in a runtime, as far as it did.

    Args:
        metrics: Of its run.

    Returns:
        ``served_kl`` (nats per token), ``served_gib``, and of the smallest batch ``decode_ms`` and
        ``prefill_tokens_per_second``.
    """
    keys = {"served_kl": "serve/kl", "served_gib": "speed/weights_gib"}
    batches = [int(match[1]) for match in map(_STEP.fullmatch, metrics) if match]
    if batches:
        smallest = f"speed/batch_{min(batches)}"
        keys |= {name: f"{smallest}/{name}" for name in ("decode_ms", "prefill_tokens_per_second")}
    return {name: metrics[key] for name, key in keys.items() if key in metrics}
