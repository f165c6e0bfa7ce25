"""What was made from sensitivity runs: schemes and probes, a row per scheme."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from layerbits.history.evaluated import verdicts
from layerbits.history.source import RawRun, connect, experiment_id, fetch, get_run, search, told
from layerbits.plain import JsonObject
from layerbits.tracking.contract import DIGEST_TAG

_PREFIXES = {"schemes": "scheme/", "probe": "probe/"}
_FACTS = ("run_id", "run_name", "source_run_id", "model", "start_time", "kv_cache", "scheme", "served_kl", "answers")


def schemes(experiment: str = "layerbits", *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The schemes that finished runs made, latest run first.

    Returns:
        A row per run and scheme: ``run_id``, ``run_name``, ``source_run_id`` (several separated by commas), ``model``,
        ``start_time`` in UTC, ``kv_cache`` of the run's schemes, ``scheme``, ``served_kl`` (nats per token, as the
        latest serve check of the same scheme in the experiment measured it in a runtime; NaN without one), ``answers``
        (the verdict of the latest evaluation of the same scheme, in words; missing without one), and the
        numbers that were logged of it (``bits``, ``score``, ``predicted_kl``, ``kv_predicted_kl``, …), missing where a
        run has none. Without rows where no such run exists.

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
    with told(uri):
        where = experiment_id(uri, experiment)
        found = search(uri, where, condition, lambda run: scheme_rows(run, _PREFIXES[kind]))
        served, said = (_served(uri, where), verdicts(uri, where)) if found else ({}, {})
    rows = [
        {**row, "served_kl": served.get(row["served_kl"]), "answers": said.get(row["served_kl"])}
        for part in reversed(found)
        for row in part
    ]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*_FACTS, *(name for row in rows for name in row)])))
    frame["served_kl"] = frame["served_kl"].astype(float)
    frame["start_time"] = pd.to_datetime(frame["start_time"], unit="ms", utc=True)
    return frame


def scheme_rows(run: RawRun, prefix: str) -> list[JsonObject]:
    """A row per scheme of a run; ``served_kl`` holds the scheme's digest as yet."""
    rows: dict[str, JsonObject] = {}
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
        "kv_cache": run.params.get("eff.kv_cache"),
    }
    return [
        {**facts, "scheme": scheme, "served_kl": run.tags.get(f"{DIGEST_TAG}{scheme}"), **numbers}
        for scheme, numbers in sorted(rows.items())
    ]


def _served(uri: str, experiment: str) -> dict[str | None, float]:
    """Digest of a scheme → KL as the latest serve check that ended well measured it in a runtime, nats per token."""
    condition = "tags.`layerbits.kind` = 'serve_check' AND tags.outcome = 'ok'"
    found = search(
        uri, experiment, condition, lambda run: (run.params.get("eff.scheme_digest"), run.metrics.get("serve/kl"))
    )
    return {digest: kl for digest, kl in found if digest is not None and kl is not None}
