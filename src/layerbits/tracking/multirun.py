"""Hydra's multirun as one parent run with a child per job."""

from __future__ import annotations

import atexit
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.experimental.callback import Callback

from layerbits.errors import UserError
from layerbits.failures import failed
from layerbits.tracking.session import parent_run
from layerbits.tracking.store import open_store

if TYPE_CHECKING:
    from omegaconf import DictConfig


_parents: list[ExitStack] = []


def end_parent(error: UserError) -> None:
    """Ends the parent run of this process's multirun before any job ran, with the reason."""
    for parent in _parents:
        parent.__exit__(type(error), error, None)


class MultirunParent(Callback):  # type: ignore[misc]  # Hydra's class, untyped here
    """Opens the parent run before the jobs of ``-m`` and closes it after them.

    Configured as ``hydra.callbacks.<name>._target_``. Reads ``tracking.enabled``, ``tracking.uri``,
    ``tracking.experiment`` and ``hydra.runtime.cwd``.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        _parents.append(self._open)

    def __reduce__(self) -> tuple[type[MultirunParent], tuple[()]]:
        """A job of a queue gets one that has opened nothing."""
        return (MultirunParent, ())

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Opens it; ends the process where the store cannot be used (Hydra only warns of an exception)."""
        if not config.tracking.enabled:
            return
        try:
            open_store(config.tracking.uri, Path(config.hydra.runtime.cwd))
            # Hydra does not call on_multirun_end when a job failed. MLflow is imported by now: its own exit handler,
            # which would end the run as FINISHED, comes after this one.
            atexit.register(self._open.close)
            name = " ".join(["multirun", *config.hydra.overrides.task])
            self._open.enter_context(parent_run(name, str(config.tracking.experiment)))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Closes it; a job that was refused before it had a run counts as one that failed."""
        error = UserError(failed[0]) if failed else None
        self._open.__exit__(None if error is None else UserError, error, None)
