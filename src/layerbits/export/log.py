"""A run per exported checkpoint: proof, numbers, the files themselves or their path, and the registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from layerbits import entry, tracking
from layerbits.export.job import ExportSettings, show
from layerbits.export.scheme import Export, NotProven
from layerbits.history.evaluated import verdicts
from layerbits.history.probed import probed_kl
from layerbits.schemes import Scheme
from layerbits.tracking.settings import TrackingSpec

ARTIFACTS = "checkpoint"
"""Folder of a run's artifacts that holds a small checkpoint."""


class ExportLog:
    """Opens a run for each export, and logs what comes of it."""

    def __init__(self, settings: ExportSettings, track: TrackingSpec, root: Path) -> None:
        self._settings = settings
        self._track = track
        self._root = root

    def __call__(self, scheme: Scheme, export: Callable[[], Export]) -> None:
        """Exports a scheme in a run of its own.

        Raises:
            UserError: The export failed, and so did its run; or it could not be logged.
        """
        from layerbits.provenance import provenance

        tags = {"layerbits.kind": "export", "source_run_id": scheme.source_run_id, "scheme": scheme.name}
        name = f"export {scheme.model.name} {scheme.name}"
        with tracking.start_run(
            name, self._track.experiment, tags=tags, system_metrics=self._track.system_metrics
        ) as session:
            try:
                made = export()
            except NotProven as error:
                tracking.log_folder(session, error.report, "")
                raise
            session.experiment(name).save(made.folder)
            show(made)
            small = made.proof.record.bytes <= self._settings.artifact_bytes
            if small:
                tracking.log_folder(session, made.folder, ARTIFACTS)
            kl = probed_kl(session.tracking_uri, session.experiment_id, scheme.name, scheme.digest)
            said = verdicts(session.tracking_uri, session.experiment_id).get(scheme.digest)
            if self._settings.register:
                self._register(session, made, kl, said, ARTIFACTS if small else "")
            metrics = made.metrics | {"probe/kl": math.nan if kl is None else kl}
            note = entry.note(made.proof.markdown() + (f"\nAnswers: {said}.\n" if said else ""))
            tags = {**provenance(self._root), **made.tags, **note}
            tracking.log_derived(session, made.report, metrics, made.parameters, tags)

    def _register(
        self, session: tracking.RunSession, made: Export, kl: float | None, said: str | None, path: str
    ) -> None:
        name = self._settings.registered_model or made.scheme.model.name
        tags = {**made.tags, "effective_bits": f"{made.scheme.effective_bits:.6g}"}
        if made.proof.logits is not None:
            tags["kl_calibration_rows"] = f"{made.proof.logits.kl_checkpoint:.6g}"
        if kl is not None:
            tags["kl"] = f"{kl:.6g}"
        if said is not None:
            tags["answers"] = said
        version = tracking.register_checkpoint(session, name, tags, path)
        print(f"registered: models:/{name}/{version}", flush=True)
