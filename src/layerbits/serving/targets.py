"""The checkpoints that are checked, found before a run is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerbits.cache import writable_cache
from layerbits.errors import UserError
from layerbits.history.checkpoints import export_runs, fetch_checkpoint
from layerbits.history.source import connect
from layerbits.inputs.weights import safetensors_files
from layerbits.results.experiment import made_by
from layerbits.serving.settings import ServeSettings


@dataclass(frozen=True)
class Target:
    """A checkpoint to check, with what is known of it.

    Attributes:
        digest: Of its tensors as they were exported; ``None`` where that is not known.
        tags: For the run.
    """

    folder: Path
    digest: str | None
    tags: Mapping[str, str]

    @property
    def title(self) -> str:
        """What it is called beside others: its scheme, or its folder where that is not known."""
        from layerbits.serving.check import read_scheme

        try:
            return read_scheme(self.folder).title
        except UserError:
            return self.folder.name


def find_targets(settings: ServeSettings, uri: str | None) -> list[Target]:
    """The checkpoints, those of a parent run of exports one by one.

    Raises:
        UserError: There is no such checkpoint, or it is not quantized.
    """
    if settings.checkpoint is not None:
        safetensors_files(settings.checkpoint)
        from layerbits.checkpoint.labels import read_quantization
        from layerbits.checkpoint.reader import open_checkpoint

        read_quantization(open_checkpoint(settings.checkpoint))
        made = made_by(settings.checkpoint)
        tags = {"export_run_id": made.run_id} if made else {}
        return [Target(settings.checkpoint, None, tags)]
    store = connect(uri)
    targets = []
    for run_id in (one for given in settings.run_ids for one in export_runs(store, given)):
        run, folder = fetch_checkpoint(store, run_id, writable_cache() / "checkpoints" / run_id)
        tags = {key: run.tags[key] for key in ("source_run_id", "scheme") if key in run.tags}
        targets.append(Target(folder, run.tags.get("checkpoint.digest"), {**tags, "export_run_id": run.run_id}))
    return targets
