"""What was made from sensitivity runs: schemes and probes, a row per scheme."""

from __future__ import annotations

from typing import Any

import pandas as pd

from layerbits.history.source import RawRun, connect, experiment_id, search, told

_PREFIXES = {"schemes": "scheme/", "probe": "probe/"}
_FACTS = ("run_id", "run_name", "source_run_id", "model", "start_time", "scheme")


def schemes(experiment: str = "layerbits", *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The schemes that finished runs made, latest run first.

    Returns:
        A row per run and scheme: ``run_id``, ``run_name``, ``source_run_id`` (several separated by commas), ``model``,
        ``start_time`` in UTC, ``scheme``, and the numbers that were logged of it (``bits``, ``score``,
        ``predicted_kl``, …), missing where a run has none. Without rows where no such run exists.

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


def _derived(kind: str, experiment: str, tracking_uri: str | None) -> pd.DataFrame:
    uri = connect(tracking_uri)
    condition = f"tags.`layerbits.kind` = '{kind}' AND attributes.status = 'FINISHED'"
    with told(uri):
        found = search(uri, experiment_id(uri, experiment), condition, lambda run: _rows(run, _PREFIXES[kind]))
    rows = [row for part in reversed(found) for row in part]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*_FACTS, *(name for row in rows for name in row)])))
    frame["start_time"] = pd.to_datetime(frame["start_time"], unit="ms", utc=True)
    return frame


def _rows(run: RawRun, prefix: str) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for key, value in run.metrics.items():
        scheme, _, number = key.removeprefix(prefix).rpartition("/")
        if key.startswith(prefix) and scheme:
            rows.setdefault(scheme, {})[number] = value
    facts = {
        "run_id": run.run_id,
        "run_name": run.info.get("run_name"),
        "source_run_id": run.tags.get("source_run_id"),
        "model": run.params.get("eff.model"),
        "start_time": run.info.get("start_time"),
    }
    return [{**facts, "scheme": scheme, **numbers} for scheme, numbers in sorted(rows.items())]
