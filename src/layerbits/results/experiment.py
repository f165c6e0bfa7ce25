"""``.experiment.json``: a file in a checkpoint's folder that names the MLflow run which made it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from layerbits.atomic import write_json

FILE = ".experiment.json"


@dataclass(frozen=True)
class Experiment:
    """A run of the tracking server.

    Attributes:
        experiment: Name of its experiment.
        run_name: Its name when it began.
        run_id: Its id.
        url: Its page, as the run printed it.
        tracking_uri: The store, without a password.
    """

    experiment: str
    run_name: str
    run_id: str
    url: str
    tracking_uri: str

    def __str__(self) -> str:
        return f"run {self.run_id} ({self.run_name}, experiment {self.experiment})"

    def save(self, folder: Path) -> Path:
        """Writes it into a checkpoint's folder."""
        write_json(folder / FILE, asdict(self))
        return folder / FILE


def made_by(folder: Path) -> Experiment | None:
    """The run that made a checkpoint; ``None`` where its folder does not say, or not in a way that can be read."""
    try:
        data = json.loads((folder / FILE).read_text("utf-8"))
        values = {name: data.get(name, "") for name in Experiment.__dataclass_fields__}
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(values["run_id"], str) or not values["run_id"]:
        return None
    return Experiment(**{name: str(value) for name, value in values.items()})
