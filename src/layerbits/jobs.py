"""One way to run a job: in a run of the tracking store, or, with ``tracking=none``, without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.results.experiment import Experiment
from layerbits.results.result import SensitivityResult
from layerbits.tracking.made import Made
from layerbits.tracking.session import RunSession
from layerbits.tracking.settings import TrackingSpec

_TAG_SIZE = 8000  # MLflow's limit, in characters


@dataclass(frozen=True)
class JobRun:
    """The run of a job; everything but the files stays out where nothing is tracked.

    Attributes:
        session: The open run, ``None`` where nothing is tracked.
        parent: Whether it ends as the runs inside it do.
    """

    name: str
    kind: str
    session: RunSession | None
    parent: bool = False

    @property
    def run_id(self) -> str:
        """Its id; empty where nothing is tracked."""
        return "" if self.session is None else self.session.run_id

    def log(self, made: Made) -> None:
        """Writes the record of what was made into its folder, and logs the folder.

        Raises:
            NotLogged: The store failed; ``layerbits push`` logs the folder later.
            UserError: The failure of what was made, once it is logged.
        """
        from layerbits import tracking

        made.save(self.name, self.kind, self.parent)
        if self.session is not None:
            tracking.log_made(self.session, made)
        if made.failure is not None:
            raise made.failure

    def log_result(self, result: SensitivityResult, folder: Path) -> None:
        """Logs a sensitivity result.

        Raises:
            NotLogged: The store failed; ``layerbits push`` logs the folder later.
        """
        from layerbits import tracking

        if self.session is not None:
            tracking.log_result(self.session, result, folder)

    def log_folder(self, folder: Path, artifact_path: str = "") -> None:
        """Logs the files of a folder as they are."""
        from layerbits import tracking

        if self.session is not None:
            tracking.log_folder(self.session, folder, artifact_path)

    def experiment(self) -> Experiment | None:
        """The run as what it makes on a disk names it."""
        return None if self.session is None else self.session.experiment(self.name)


class Tracker:
    """Opens the runs of a job in the store that its settings name, once that answers.

    Args:
        spec: Where to log, if at all.
        root: Folder of the embedded store.

    Attributes:
        uri: The store that earlier runs are read from.

    Raises:
        UserError: The store cannot be used.
    """

    def __init__(self, spec: TrackingSpec, root: Path) -> None:
        from layerbits import tracking

        self.spec = spec
        self.uri = tracking.open_store(spec.uri, root) if spec.enabled else spec.uri
        self._given_name = spec.run_name

    @property
    def enabled(self) -> bool:
        """Whether anything is logged."""
        return self.spec.enabled

    @contextmanager
    def run(
        self,
        name: str,
        kind: str = "",
        tags: Mapping[str, str] | None = None,
        system_metrics: bool = False,
        parent: JobRun | None = None,
    ) -> Iterator[JobRun]:
        """Opens a run; the first one has the name that the settings give, if they do.

        Args:
            name: Its name otherwise.
            kind: ``layerbits.kind``; sensitivity runs have none.
            tags: From the start.
            system_metrics: Whether the run takes long enough for MLflow's system metrics.
            parent: Makes it a nested run of one that does not end as its children do.
        """
        from layerbits import tracking

        name = self._named(name)
        if not self.enabled:
            yield JobRun(name, kind, None)
            return
        above = parent.run_id if parent is not None else None
        metrics = system_metrics and self.spec.system_metrics
        with tracking.start_run(name, self.spec.experiment, above, _tags(kind, tags), metrics) as session:
            yield JobRun(name, kind, session)

    @contextmanager
    def parent(self, name: str, kind: str = "", tags: Mapping[str, str] | None = None) -> Iterator[JobRun]:
        """Opens a run that ends as the runs opened inside it do (arguments: :meth:`run`)."""
        from layerbits import tracking

        name = self._named(name)
        if not self.enabled:
            yield JobRun(name, kind, None, parent=True)
            return
        with tracking.parent_run(name, self.spec.experiment, _tags(kind, tags)) as session:
            yield JobRun(name, kind, session, parent=True)

    def skipped(self, name: str, reason: str) -> None:
        """Records, below the open parent, a part of a job that had nothing left to do."""
        from layerbits import tracking

        if self.enabled and os.environ.get(tracking.PARENT_VARIABLE):
            tracking.log_cell(name, "skipped", reason, experiment=self.spec.experiment)

    def _named(self, name: str) -> str:
        given, self._given_name = self._given_name, None
        return given or name


def run_job(
    spec: TrackingSpec,
    root: Path,
    name: str,
    kind: str,
    make: Callable[[str | None], Made],
    system_metrics: bool = False,
) -> JobRun:
    """Makes something out of earlier runs in a run of its own.

    Args:
        spec: Where to log, if at all.
        root: Folder of the embedded store.
        name: Of the run, unless the settings give one.
        kind: ``layerbits.kind`` of the run.
        make: Gets the URI of the store that earlier runs are read from.
        system_metrics: Whether it takes long enough for MLflow's system metrics.

    Returns:
        The run, which has ended.
    """
    tracker = Tracker(spec, root)
    with tracker.run(name, kind, system_metrics=system_metrics) as run:
        run.log(make(tracker.uri))
    return run


def refusal(check: Callable[[], object]) -> UserError | None:
    """Why something that was made does not pass a check; ``None`` where it does."""
    try:
        check()
    except UserError as error:
        return error
    return None


def note(markdown: str) -> dict[str, str]:
    """The tag that MLflow's run page shows as a description; whole lines, as many as a tag holds."""
    lines = markdown.splitlines()
    while sum(len(line) + 1 for line in lines) > _TAG_SIZE:
        lines.pop()
    return {"mlflow.note.content": "\n".join(lines)}


def _tags(kind: str, tags: Mapping[str, str] | None) -> dict[str, str]:
    return {**({"layerbits.kind": kind} if kind else {}), **(tags or {})}
