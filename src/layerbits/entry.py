"""What the entry scripts share: command lines as MLflow passes them, errors in one line, runs of derived results."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerbits import process
from layerbits.errors import UserError
from layerbits.overrides import check_grammar, hydra_arguments

if TYPE_CHECKING:
    from layerbits.tracking.settings import TrackingSpec

USER_ERROR_STATUS = 2

failed: list[str] = []
"""Why jobs of this process's multirun, or cells of its grid, failed, one line each."""
_TAG_SIZE = 8000  # MLflow's limit, in characters


def check_choices(arguments: Sequence[str], configs: Path) -> None:
    """Checks choices of config groups before Hydra does, for an error in one line.

    Args:
        arguments: Hydra's command line.
        configs: Folder of the config groups; a choice may also be in a folder given by ``--config-dir``.

    Raises:
        UserError: A group has no such choice.
    """
    if any(a.startswith(("--config-dir", "-cd", "hydra.searchpath")) for a in arguments):
        return
    for argument in arguments:
        group, _, values = argument.lstrip("+").partition("=")
        if not values or not (configs / group).is_dir() or values in ("null", "~") or group == _LAUNCHER:
            continue
        known = sorted(p.stem for p in (configs / group).glob("*.yaml"))
        for value in values.split(","):
            if value not in known:
                close = get_close_matches(value, known)
                hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)},"
                raise UserError(f"{group}={value} is not known; {hint} or add configs/{group}/{value}.yaml")


_LAUNCHER = "hydra/launcher"
_LAUNCHERS = {
    "basic": "hydra._internal.core_plugins.basic_launcher",
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
}
"""Launchers that Hydra's own project publishes, and the module that each comes with."""
_WATCHED = "hydra/launcher=watched_slurm"
"""The same launcher, but it waits for every job (``hydra_plugins/layerbits_launcher``)."""


def check_launcher(arguments: Sequence[str]) -> None:
    """Checks that a launcher is installed before Hydra does, for an error in one line.

    Args:
        arguments: Hydra's command line.

    Raises:
        UserError: It is not.
    """
    for argument in arguments:
        group, _, name = argument.lstrip("+").partition("=")
        if group != _LAUNCHER or name not in _LAUNCHERS:
            continue
        module = _LAUNCHERS[name]
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            package = module.rpartition(".")[2].replace("_", "-")
            raise UserError(f"{argument} needs a package that is not installed; pip install {package}")
        if name == "submitit_slurm" and shutil.which("sbatch") is None:
            raise UserError(f"{argument}, but there is no sbatch here; start it on a machine that submits to Slurm")


def run(main: Callable[[], object], configs: Path) -> None:
    """Runs a script's main function; a :class:`UserError` ends it with one line and status 2.

    Args:
        main: Decorated by ``hydra.main``.
        configs: Folder of the config groups.
    """
    process.prepare()
    try:
        arguments = hydra_arguments(sys.argv[1:])
        check_launcher(arguments)
        arguments = [_WATCHED if a == "hydra/launcher=submitit_slurm" else a for a in arguments]
        check_choices(arguments, configs)
        check_grammar(arguments)
        sys.argv[1:] = arguments
        main()
    except UserError as error:
        fail(error)


def start(job: Callable[[dict[str, Any]], object], configs: Path, name: str) -> None:
    """Runs a script's job on the configuration that Hydra composes from the command line, as plain data.

    Args:
        job: Takes the resolved configuration.
        configs: Folder of the config groups.
        name: File of ``configs`` to start from, without ``.yaml``.
    """
    import hydra
    from omegaconf import OmegaConf

    def task(config: Any) -> None:
        try:
            job(OmegaConf.to_container(config, resolve=True))
        except UserError as error:  # here, because Hydra would print a traceback
            fail(error)

    sys.argv.append(f"hydra.job.name={Path(sys.argv[0]).stem}")  # Hydra would take this file's
    run(hydra.main(version_base="1.3", config_path=str(configs), config_name=name)(task), configs)


@dataclass(frozen=True)
class Derived:
    """What a job made from earlier runs, for its own run.

    Attributes:
        folder: Its files, complete on disk.
    """

    folder: Path
    metrics: Mapping[str, float]
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def log_derived(
    kind: str, name: str, track: TrackingSpec, root: Path, make: Callable[[str | None], Derived], system_metrics: bool
) -> None:
    """Opens a run for a result that is derived from others, makes the result and logs it; or makes it without a run.

    Args:
        kind: ``layerbits.kind`` of the run.
        name: Its name, unless the settings give one.
        track: Where to log, if at all.
        root: Folder of the embedded store.
        make: Gets the URI of the store that earlier runs are read from.
        system_metrics: Whether the run takes long enough for MLflow's system metrics.
    """
    if not track.enabled:
        make(track.uri)
        return
    from layerbits import tracking

    uri = tracking.open_store(track.uri, root)
    tags = {"layerbits.kind": kind}
    metrics = system_metrics and track.system_metrics
    with tracking.start_run(track.run_name or name, track.experiment, tags=tags, system_metrics=metrics) as session:
        made = make(uri)
        tracking.log_derived(session, made.folder, made.metrics, made.params, made.tags)


def note(markdown: str) -> dict[str, str]:
    """The tag that MLflow's run page shows as a description; whole lines, as many as a tag holds."""
    lines = markdown.splitlines()
    while sum(len(line) + 1 for line in lines) > _TAG_SIZE:
        lines.pop()
    return {"mlflow.note.content": "\n".join(lines)}


def fail(error: UserError) -> None:
    """Prints the error's one line and exits with status 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_STATUS)
