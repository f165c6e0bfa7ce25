"""Where to log, as typed settings."""

from __future__ import annotations

from dataclasses import dataclass

from layerbits.errors import UserError
from layerbits.plain import Composed, flag


@dataclass(frozen=True)
class TrackingSpec:
    """The ``tracking`` group of the configuration."""

    enabled: bool
    uri: str | None
    experiment: str
    run_name: str | None
    system_metrics: bool

    @classmethod
    def from_config(cls, config: Composed) -> TrackingSpec:
        """Reads the ``tracking`` group of a resolved configuration; a name that looks like a number is a name.

        Raises:
            UserError: A switch is neither true nor false, or there is no name of an experiment.
        """
        values = dict(config["tracking"])
        if values["experiment"] in (None, ""):
            raise UserError("tracking.experiment has no name; give one, for instance layerbits")
        for key in ("enabled", "system_metrics"):
            flag(f"tracking.{key}", values[key])
        names = {key: str(values[key]) for key in ("uri", "experiment", "run_name") if values[key] is not None}
        return cls(**{**values, **names})
