"""A run per exported checkpoint: proof, numbers, the files themselves or their path, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from layerbits.export.card import write_measured
from layerbits.export.job import show
from layerbits.export.scheme import Export, NotProven
from layerbits.export.settings import ExportSettings
from layerbits.history.evaluated import answers_of, verdicts
from layerbits.history.probed import probed_kl
from layerbits.jobs import JobRun, Tracker, note
from layerbits.schemes import Scheme
from layerbits.tracking.made import Made, Recorded, Registration, read_record

ARTIFACTS = "checkpoint"
"""Folder of a run's artifacts that holds a small checkpoint."""

KIND = "export"
_OF_THE_VERSION = ("source_run_id", "scheme", "checkpoint.path", "checkpoint.digest", "checkpoint.labels")


class ExportLog:
    """Opens a run for each export, and logs what comes of it."""

    def __init__(self, settings: ExportSettings, tracker: Tracker, root: Path) -> None:
        self._settings = settings
        self._tracker = tracker
        self._root = root

    def __call__(self, scheme: Scheme, export: Callable[[], Export]) -> None:
        """Exports a scheme in a run of its own.

        Raises:
            UserError: The export failed, and so did its run; or it could not be logged.
        """
        from layerbits.provenance import provenance

        tags = {"source_run_id": scheme.source_run_id, "scheme": scheme.name}
        with self._tracker.run(_name(scheme), KIND, tags, system_metrics=True) as run:
            try:
                made = export()
            except NotProven as error:
                run.log_folder(error.report)
                raise
            self._name_run(run, made.folder)
            show(made)
            small = made.proof.record.bytes <= self._settings.artifact_bytes
            probed = self._probed(run, scheme)
            metrics = {**made.metrics, **probed}
            if (answers := self._answers(run, scheme)) or probed:
                write_measured(made.folder, probed.get("probe/kl"), answers)
            said = self._verdict(run, scheme)
            words = made.proof.markdown() + (f"\nAnswers: {said}.\n" if said else "")
            about = {**provenance(self._root), **made.tags, **note(words)}
            artifacts = {ARTIFACTS: made.folder} if small else {}
            data, measured = made.data, made.measured(metrics)
            record = Made(
                made.report, metrics, made.parameters, about, artifacts=artifacts, data=data, measured=measured
            )
            run.log(self._with_registration(record, scheme, said))

    def log_earlier(self, scheme: Scheme, folder: Path) -> None:
        """Logs and registers an export that an earlier start of the same job left, where that is missing.

        Raises:
            UserError: The store failed.
        """
        print(f"{scheme.name} is exported and proven already: {folder}; delete it to do so again", flush=True)
        recorded = read_record(folder.with_name(f"{folder.name}.report"))
        if not self._tracker.enabled:
            return
        if recorded is None:
            self._tracker.skipped(_name(scheme), f"exported and proven already: {folder}")
            return
        self._log_again(scheme, recorded, folder)

    def _log_again(self, scheme: Scheme, recorded: Recorded, folder: Path) -> None:
        from layerbits import tracking

        known = tracking.run_of(recorded.made.record_id)
        plain = replace(recorded.made, registration=None)
        if known is None:
            tags = {"source_run_id": scheme.source_run_id, "scheme": scheme.name}
            with self._tracker.run(_name(scheme), KIND, tags) as run:
                self._name_run(run, folder)
                run.log(self._with_registration(plain, scheme, self._verdict(run, scheme)))
            return
        made = self._with_registration(plain, scheme, None)
        if made.registration is not None:
            tracking.register_run(known, made.registration)
        self._tracker.skipped(_name(scheme), f"exported and logged already in run {known}")

    def _with_registration(self, made: Made, scheme: Scheme, said: str | None) -> Made:
        if not self._settings.register:
            return made
        tags = {key: made.tags[key] for key in _OF_THE_VERSION if key in made.tags}
        tags |= _numbers(
            made.metrics,
            {
                "effective_bits": "summary/effective_bits",
                "kl_calibration_rows": "proof/kl_checkpoint",
                "kl": "probe/kl",
            },
        )
        tags |= {} if said is None else {"answers": said}
        name = self._settings.registered_model or scheme.model.name
        return replace(made, registration=Registration(name, tags, ARTIFACTS if made.artifacts else ""))

    def _name_run(self, run: JobRun, folder: Path) -> None:
        if (experiment := run.experiment()) is not None:
            experiment.save(folder)

    def _verdict(self, run: JobRun, scheme: Scheme) -> str | None:
        """What evaluations say of the scheme's answers, where there is one."""
        if run.session is None:
            return None
        return verdicts(run.session.tracking_uri, run.session.experiment_id).get(scheme.digest)

    def _answers(self, run: JobRun, scheme: Scheme) -> list[dict[str, object]]:
        """The same as rows of its model card."""
        if run.session is None:
            return []
        return answers_of(run.session.tracking_uri, run.session.experiment_id, scheme.digest)

    def _probed(self, run: JobRun, scheme: Scheme) -> dict[str, float]:
        """The KL of the latest probe of the scheme, where there is one."""
        if run.session is None:
            return {}
        kl = probed_kl(run.session.tracking_uri, run.session.experiment_id, scheme.name, scheme.digest)
        return {} if kl is None else {"probe/kl": kl}


def _numbers(metrics: Mapping[str, float], keys: Mapping[str, str]) -> dict[str, str]:
    known = {name: metrics.get(key) for name, key in keys.items()}
    return {name: f"{value:.6g}" for name, value in known.items() if value is not None}


def _name(scheme: Scheme) -> str:
    return f"export {scheme.title}"
