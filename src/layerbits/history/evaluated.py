"""What evaluations found of schemes' answers, a row per task and scheme."""

from __future__ import annotations

import re

import pandas as pd

from layerbits.history.source import RawRun, connect, experiment_id, search, store_errors
from layerbits.tracking.contract import DIGEST_TAG, VERDICT_TAG

_PREFIX = "eval/"
_FACTS = ("run_id", "run_name", "source_run_id", "model", "start_time", "task", "scheme", "digest", "documents")


def evaluations(experiment: str = "layerbits", *, tracking_uri: str | None = None) -> pd.DataFrame:
    """What finished evaluations found, latest run first.

    Returns:
        A row per run, task and scheme: ``run_id``, ``run_name``, ``source_run_id`` (several separated by commas),
        ``model``, ``start_time`` in UTC, ``task``, ``scheme`` (``unquantized`` for the model itself), ``digest`` of the
        scheme, ``documents``, and the numbers of ``docs/tracking.md`` (``accuracy``, ``difference``,
        ``difference_low``, ``difference_high``, ``lost``, ``won``, ``p_holm``, ``kl``, ``bits``, …), missing where a
        run has none. Without rows where no such run exists.

    Raises:
        UserError: The store cannot be read, or there is no such experiment.
    """
    uri = connect(tracking_uri)
    condition = "tags.`layerbits.kind` = 'evaluation' AND attributes.status = 'FINISHED'"
    with store_errors(uri):
        runs = search(uri, experiment_id(uri, experiment), condition, rows_of)
    rows = [row for part in reversed(runs) for row in part]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*_FACTS, *(name for row in rows for name in row)])))
    frame["start_time"] = pd.to_datetime(frame["start_time"], unit="ms", utc=True)
    return frame


def verdicts(uri: str, experiment: str) -> dict[str, str]:
    """Digest of a scheme → what the latest finished evaluation said of its answers.

    Args:
        uri: The store.
        experiment: Experiment id.

    Raises:
        UserError: The store cannot be read.
    """
    condition = "tags.`layerbits.kind` = 'evaluation' AND tags.outcome = 'ok'"
    with store_errors(uri):
        tag_sets = search(uri, experiment, condition, lambda run: run.tags)
    return {
        digest: tags[f"{VERDICT_TAG}{key.removeprefix(DIGEST_TAG)}"]
        for tags in tag_sets
        for key, digest in tags.items()
        if key.startswith(DIGEST_TAG) and f"{VERDICT_TAG}{key.removeprefix(DIGEST_TAG)}" in tags
    }


def answers_of(uri: str, experiment: str, digest: str) -> list[dict[str, object]]:
    """What the latest finished evaluation found of a scheme's answers, for a report or a model card.

    Args:
        uri: The store.
        experiment: Experiment id.
        digest: Of the scheme.

    Returns:
        A row per task: ``task``, ``documents``, ``unquantized`` and ``accuracy`` (shares right), ``difference`` with
        ``difference_low`` and ``difference_high`` (the paired 95 % interval), ``verdict`` in words and ``run_id``; no
        row where the scheme was not evaluated.

    Raises:
        UserError: The store cannot be read.
    """
    condition = "tags.`layerbits.kind` = 'evaluation' AND tags.outcome = 'ok'"
    with store_errors(uri):
        evaluations = search(uri, experiment, condition, lambda run: (run.tags, rows_of(run)))
    latest = next(((t, rows) for t, rows in reversed(evaluations) if any(r["digest"] == digest for r in rows)), None)
    if latest is None:
        return []
    tags, rows = latest
    name = next(row["scheme"] for row in rows if row["digest"] == digest)
    tasks = "|".join(re.escape(str(row["task"])) for row in rows if row["scheme"] == name)
    parts = re.split(f"(?:^|; )({tasks}): ", tags.get(f"{VERDICT_TAG}{name}", ""))
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    before = {row["task"]: row.get("accuracy") for row in rows if row["scheme"] == "unquantized"}
    numbers = ("documents", "accuracy", "difference", "difference_low", "difference_high")
    return [
        {
            "task": row["task"],
            "unquantized": before.get(row["task"]),
            **{number: row.get(number) for number in numbers},
            "verdict": said.get(str(row["task"]), ""),
            "run_id": row["run_id"],
        }
        for row in rows
        if row["scheme"] == name
    ]


def rows_of(run: RawRun) -> list[dict[str, object]]:
    """A row per task and scheme of a run."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    documents: dict[str, float] = {}
    for key, value in run.metrics.items():
        parts = key.removeprefix(_PREFIX).split("/")
        if key.startswith(_PREFIX) and len(parts) == 3:
            task, scheme, number = parts
            rows.setdefault((task, scheme), {})[number] = value
        elif key.startswith(_PREFIX) and parts[1:] == ["documents"]:
            documents[parts[0]] = value
    return [
        {
            **run.facts,
            "task": task,
            "scheme": scheme,
            "digest": run.tags.get(f"{DIGEST_TAG}{scheme}"),
            "documents": documents.get(task),
            **numbers,
        }
        for (task, scheme), numbers in sorted(rows.items())
    ]
