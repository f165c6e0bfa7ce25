"""What ties the metrics of a run to other things in MLflow: data, models, and the runs that made a scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from layerbits.report.remarks import with_remarks
from layerbits.tracking.contract import DIGEST_TAG, EXTERNAL_TAG, IDENTITY_TAG
from layerbits.tracking.made import Data, Measured

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_MODEL_TYPE = "scheme"
_FORBIDDEN = str.maketrans(dict.fromkeys("/:.%\"'", "-"))
_NOTE = "mlflow.note.content"


def log_data(client: MlflowClient, run_id: str, data: Sequence[Data]) -> None:
    """Logs what a run was measured on as its inputs; again changes nothing.

    Args:
        client: Of the store.
        run_id: The run.
        data: The data.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    if not data:
        return
    inputs = [DatasetInput(Dataset(**one.fields), [InputTag("mlflow.data.context", one.context)]) for one in data]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as error:
        # Of two runs that bring the same new dataset at once, PostgreSQL refuses one; now it is there.
        if error.error_code != "BAD_REQUEST":
            raise
        client.log_inputs(run_id, inputs)


def models_of(client: MlflowClient, experiment: str, run_id: str, measured: Iterable[Measured]) -> dict[str, str]:
    """Id of the logged model of each thing that was measured, made where the experiment has none.

    Args:
        client: Of the store.
        experiment: Experiment id.
        run_id: The run that measured.
        measured: What was measured.

    Returns:
        Identity → id; empty where the server is older than logged models (MLflow 3).
    """
    from mlflow.exceptions import MlflowException

    names = {one.identity: one.model for one in measured}
    ids: dict[str, str] = {}
    try:
        for identity, name in names.items():
            known = client.search_logged_models([experiment], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1)
            if known:
                ids[identity] = str(known[0].model_id)
                continue
            tags = {IDENTITY_TAG: identity, EXTERNAL_TAG: "true"}
            made = client.create_logged_model(
                experiment, name.translate(_FORBIDDEN), run_id, tags, model_type=_MODEL_TYPE
            )
            client.finalize_logged_model(made.model_id, "READY")
            ids[identity] = str(made.model_id)
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        return {}
    return ids


def tag_models(client: MlflowClient, measured: Iterable[Measured], ids: Mapping[str, str]) -> None:
    """Gives the logged models their tags.

    Args:
        client: Of the store.
        measured: What was measured.
        ids: From :func:`models_of`.
    """
    for one in measured:
        if one.tags and one.identity in ids:
            client.set_logged_model_tags(ids[one.identity], dict(one.tags))


def values_of(
    run_id: str, measured: Sequence[Measured], data: Sequence[Data], ids: Mapping[str, str], now: int
) -> list[Metric]:
    """Metrics of the models under the names that all of them share, a step of the run for each model.

    Args:
        run_id: The run.
        measured: Of what they are.
        data: The run's data.
        ids: From :func:`models_of`.
        now: Milliseconds since 1970.
    """
    from mlflow.entities import Metric

    steps = {identity: step for step, identity in enumerate(dict.fromkeys(one.identity for one in measured))}
    return [
        Metric(key, value, now, steps[one.identity], **_about(one, run_id, data, ids))
        for one in measured
        if one.identity in ids
        for key, value in one.values.items()
        if math.isfinite(value)
    ]


def linked(
    run_id: str, metrics: Sequence[Metric], measured: Iterable[Measured], data: Sequence[Data], ids: Mapping[str, str]
) -> list[Metric]:
    """Metrics with the model and the data that they are of.

    Args:
        run_id: The run.
        metrics: As they would be logged.
        measured: Of what they are.
        data: The run's data.
        ids: From :func:`models_of`.
    """
    from mlflow.entities import Metric

    about = {key: one for one in measured if one.identity in ids for key in one.metrics}
    return [
        metric
        if (one := about.get(metric.key)) is None
        else Metric(metric.key, metric.value, metric.timestamp, metric.step, **_about(one, run_id, data, ids))
        for metric in metrics
    ]


def _about(one: Measured, run_id: str, data: Sequence[Data], ids: Mapping[str, str]) -> dict[str, str | None]:
    """What a metric is of: fields of MLflow's entity."""
    digests = {each.fields["name"]: each.fields["digest"] for each in data}
    return {
        "model_id": ids[one.identity],
        "dataset_name": one.dataset or None,
        "dataset_digest": digests.get(one.dataset),
        "run_id": run_id,
    }


def remark(client: MlflowClient, experiment: str, remarks: Mapping[str, str]) -> None:
    """Writes what was found of schemes into the descriptions of the runs that made or exported them.

    Args:
        client: Of the store.
        experiment: Experiment id.
        remarks: Digest of a scheme → a line.
    """
    for kind in ("schemes", "recipe", "export") if remarks else ():
        for run in client.search_runs([experiment], f"tags.`layerbits.kind` = '{kind}' AND tags.outcome = 'ok'"):
            tags, parameters = run.data.tags, run.data.params
            digests = {k.removeprefix(DIGEST_TAG): v for k, v in tags.items() if k.startswith(DIGEST_TAG)}
            if kind == "export":
                digests = {tags.get("scheme", ""): parameters.get("eff.scheme_digest", "")}
            said = {name: remarks[digest] for name, digest in digests.items() if digest in remarks}
            note = str(tags.get(_NOTE, ""))
            if said and (new := with_remarks(note, said)) != note:
                client.set_tag(run.info.run_id, _NOTE, new)
