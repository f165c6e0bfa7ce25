"""Speed and memory of a checkpoint at the command line: timed, printed, and logged where it is known what it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from layerbits.errors import UserError
from layerbits.history.source import connect, experiment_name, sqlite_file
from layerbits.paths import user_path
from layerbits.results.experiment import made_by
from layerbits.serving.check import MANIFEST
from layerbits.serving.environment import find_environment
from layerbits.serving.foreground import prepare
from layerbits.serving.runs import run_checks
from layerbits.serving.server import Refused
from layerbits.serving.settings import ServeSettings, SpeedRequest, VllmSettings, check_is_checkpoint
from layerbits.serving.speed import measure_speed
from layerbits.tracking.settings import TrackingSpec

USUAL = SpeedRequest(batches=(1, 8, 32), prompt_tokens=512, new_tokens=64, repeats=5)
"""What ``--measure`` times: the defaults of ``configs/serve_check.yaml``."""

ON_CPU = SpeedRequest(batches=(1,), prompt_tokens=64, new_tokens=8, repeats=3)
"""The same where there is no GPU; the usual would take an hour."""


def measure(reference: str, python: str | None, plugin: Path | None, arguments: Sequence[str], uri: str | None) -> None:
    """Times a checkpoint in vLLM beside its unquantized model, prints what came out and logs it as a serve check.

    Its answers are not compared. Where there is no store, nothing is logged. A checkpoint that LayerBits did not export
    is timed alone and not logged.

    Args:
        reference: Run id of an export or of several, or a checkpoint's folder.
        python: A Python with vLLM; ``None`` = that of ``.venv-vllm`` in the current folder.
        plugin: Folder with a plugin of vLLM.
        arguments: Further arguments of the engine.
        uri: The store; ``None`` = ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the current folder.

    Raises:
        UserError: There is no such checkpoint, or no vLLM, or vLLM does not load it here.
    """
    folder = user_path(reference)
    is_folder = (folder / "config.json").is_file()
    if is_folder and not (folder / MANIFEST).is_file():
        _print_alone(reference, python, plugin, arguments, uri)
        return
    if not is_folder and "/" in reference:
        check_is_checkpoint(folder)
    asked = ON_CPU if find_environment(python, Path.cwd()).on_cpu else USUAL
    tracking = _of_folder(folder, uri) if is_folder else _of_run(reference, uri)
    settings = ServeSettings(
        run_ids=() if is_folder else (reference,),
        checkpoint=folder if is_folder else None,
        output_root=user_path("outputs"),
        vllm=VllmSettings(python=python, plugin=plugin, arguments=tuple(arguments)),
        speed=asked,
        compare=False,
    )
    run_checks(settings, tracking, Path.cwd())
    if not tracking.enabled:
        print(_not_logged(folder))


def _print_alone(
    reference: str, python: str | None, plugin: Path | None, arguments: Sequence[str], uri: str | None
) -> None:
    """Times a checkpoint of which nothing is known but its files.

    Raises:
        UserError: There is no vLLM, or it does not load it.
    """
    folder, launch = prepare(reference, python, plugin, arguments, uri)
    with TemporaryDirectory() as work:
        try:
            asked = ON_CPU if launch.environment.on_cpu else USUAL
            speed = measure_speed(launch, folder, folder.name, asked, Path(work))
        except Refused as words:
            raise UserError(f"vLLM does not load {folder}: {words}") from None
    print(f"{folder.name} in {launch.environment.package} {launch.environment.version}, {speed.device}. {speed.how}")
    for what, value in speed.rows():
        print(f"{what + ':':<34}{value}")
    print(
        f"not logged, and timed alone: {folder} has no {MANIFEST}, so LayerBits did not export it, and neither its "
        "scheme nor its unquantized model is known"
    )


def _of_run(run_id: str, uri: str | None) -> TrackingSpec:
    """Logs beside an export's run.

    Raises:
        UserError: There is no such run, or no store.
    """
    store = connect(uri)
    return _spec(store, experiment_name(store, run_id))


def _of_folder(folder: Path, uri: str | None) -> TrackingSpec:
    """Logs to the store of the command line or of the environment, else to one that is in the current folder."""
    made = made_by(folder)
    store = uri or os.environ.get("MLFLOW_TRACKING_URI")
    file = sqlite_file(store or "")
    there = bool(store) or (file is not None and file.exists())
    return _spec(store, made.experiment if made is not None and made.experiment else "layerbits", there)


def _spec(store: str | None, experiment: str, enabled: bool = True) -> TrackingSpec:
    return TrackingSpec(enabled, store, experiment, run_name=None, system_metrics=True)


def _not_logged(folder: Path) -> str:
    made = made_by(folder)
    where = f" (its export is in {made.tracking_uri})" if made is not None and made.tracking_uri else ""
    return (
        f"not logged: there is no store here, as {sqlite_file('')} does not exist; name one with --tracking-uri or "
        f"MLFLOW_TRACKING_URI{where}"
    )
