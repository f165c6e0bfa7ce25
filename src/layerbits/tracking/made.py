"""What a job made, as its run and its folder hold it: enough to log the folder later."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from layerbits.atomic import write_json
from layerbits.errors import Skipped, UserError

RECORD = "run.json"
"""File of a result's folder that says what its run holds."""

_VERSION = 1


@dataclass(frozen=True)
class Registration:
    """A version of a registered model that is to be made of a run.

    Attributes:
        name: The registered model.
        artifact_path: Folder of the run's artifacts that the version is; empty = all of them.
    """

    name: str
    tags: Mapping[str, str]
    artifact_path: str = ""


@dataclass(frozen=True)
class Data:
    """Data that something was measured on, as an input of its run.

    Attributes:
        fields: Of MLflow's dataset: ``name``, ``digest`` (36 characters at most), ``source_type``, ``source``,
            ``schema`` and ``profile``.
        context: What it was used for.
    """

    fields: Mapping[str, str]
    context: str


@dataclass(frozen=True)
class Measured:
    """Of what some metrics are: a model of MLflow, and the data it was measured on.

    Attributes:
        model: Name of the model: a scheme, or the unquantized model.
        identity: What tells it from others; the same model of another run has the same.
        metrics: Their keys.
        dataset: Name of one of :attr:`Made.data`; empty where they are of none.
        values: Numbers of the model under names that all models share, so that they can be searched and sorted by.
        tags: Of the model.
    """

    model: str
    identity: str
    metrics: tuple[str, ...]
    dataset: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What a job made, complete on disk.

    Attributes:
        folder: Its files.
        metrics: Values; what is not finite is left out, as a chart would show it as 1.8e308.
        params: Parameters by their names in the contract.
        tags: Tags, ``source_run_id`` among them.
        failure: Why the run fails although everything was made, as a check that did not pass.
        artifacts: Artifact path → further folder that is logged there.
        registration: What to register.
        data: What it was measured on.
        measured: Which metrics are of which model and data.
        remarks: Digest of a scheme → a line for the descriptions of the runs that made it.
    """

    folder: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    failure: UserError | None = None
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    registration: Registration | None = None
    data: tuple[Data, ...] = ()
    measured: tuple[Measured, ...] = ()
    remarks: Mapping[str, str] = field(default_factory=dict)

    @property
    def finite(self) -> dict[str, float]:
        """The metrics that can be logged."""
        return {key: float(value) for key, value in self.metrics.items() if math.isfinite(value)}

    @property
    def record_id(self) -> str:
        """What tells it from every other; after :meth:`save`."""
        return hashlib.sha256((self.folder / RECORD).read_bytes()).hexdigest()[:32]

    def save(self, name: str, kind: str, parent: bool = False) -> None:
        """Writes the record into the folder.

        Args:
            name: Of the run.
            kind: ``layerbits.kind`` of the run.
            parent: Whether the run ends as its children do.
        """
        write_json(
            self.folder / RECORD,
            {
                "schema_version": _VERSION,
                "name": name,
                "kind": kind,
                "parent": parent,
                "metrics": self.finite,
                "params": dict(self.params),
                "tags": dict(self.tags),
                "failure": None if self.failure is None else str(self.failure),
                "skipped": isinstance(self.failure, Skipped),
                "artifacts": {path: str(folder) for path, folder in self.artifacts.items()},
                "registration": None
                if self.registration is None
                else {**vars(self.registration), "tags": dict(self.registration.tags)},
                "data": [{"fields": dict(one.fields), "context": one.context} for one in self.data],
                "measured": [asdict(one) for one in self.measured],
                "remarks": dict(self.remarks),
            },
        )


@dataclass(frozen=True)
class Recorded:
    """A folder's record: what was made, and its run: name, kind, and whether it ends as its children do."""

    made: Made
    name: str
    kind: str
    parent: bool


def read_record(folder: Path) -> Recorded | None:
    """What :meth:`Made.save` wrote; ``None`` where a folder has no record.

    Raises:
        UserError: It cannot be read.
    """
    try:
        data = json.loads((folder / RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / RECORD} is not JSON ({error}); make the result again") from None
    try:
        failure = None if data["failure"] is None else (Skipped if data["skipped"] else UserError)(data["failure"])
        registration = None if data["registration"] is None else Registration(**data["registration"])
        artifacts = {path: Path(place) for path, place in data["artifacts"].items()}
        made = Made(
            folder, data["metrics"], data["params"], data["tags"], failure, artifacts, registration,
            data=tuple(Data(**one) for one in data.get("data", ())),
            measured=tuple(
                Measured(
                    one["model"], one["identity"], tuple(one["metrics"]), one["dataset"], one.get("values", {}),
                    one.get("tags", {}),
                )
                for one in data.get("measured", ())
            ),
            remarks=data.get("remarks", {}),
        )  # fmt: skip
        return Recorded(made, str(data["name"]), str(data["kind"]), bool(data["parent"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / RECORD} is not a record that this version reads ({error!r})") from None
