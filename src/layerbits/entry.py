"""What the entry scripts share: command lines as MLflow passes them, and errors in one line."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits import process
from layerbits.errors import UserError
from layerbits.failures import failed
from layerbits.keys import composition_error
from layerbits.libraries import known_lines_left_out
from layerbits.overrides import check_grammar, hydra_arguments
from layerbits.plain import JsonObject
from layerbits.usage import usage

if TYPE_CHECKING:
    from omegaconf import DictConfig

USER_ERROR_STATUS = 2


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
            spec = find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            package = module.rpartition(".")[2].replace("_", "-")
            raise UserError(f"{argument} needs a package that is not installed; pip install {package}")
        if name == "submitit_slurm" and shutil.which("sbatch") is None:
            raise UserError(f"{argument}, but there is no sbatch here; start it on a machine that submits to Slurm")


def start(job: Callable[[JsonObject, Path], object], script: str, config: str) -> None:
    """Runs the job of an entry script on the configuration that Hydra composes from the command line.

    With ``--help`` it prints the script's usage and settings instead.

    A :class:`UserError` ends it with one line and status 2; in a multirun (``-m``) the other jobs go on, and the
    status is 2 at the end.

    Args:
        job: Takes the resolved configuration as plain data, and the project folder.
        script: ``__file__`` of the script, in a folder of the project.
        config: File of ``configs`` to start from, without ``.yaml``.
    """
    process.prepare()
    root = Path(script).resolve().parent.parent
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(Path(script), root / "configs", config), end="")
        return
    try:
        _start(job, root, config)
    except UserError as error:
        fail(error)
    if failed:
        sys.exit(USER_ERROR_STATUS)


def _start(job: Callable[[JsonObject, Path], object], root: Path, config: str) -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors instead of printing several lines
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    configs = root / "configs"
    arguments = hydra_arguments(sys.argv[1:])
    check_launcher(arguments)
    arguments = [_WATCHED if a == "hydra/launcher=submitit_slurm" else a for a in arguments]
    check_choices(arguments, configs)
    check_grammar(arguments)
    sys.argv[1:] = [*arguments, f"hydra.job.name={Path(sys.argv[0]).stem}"]  # Hydra would take this file's

    def task(composed: DictConfig) -> str | None:
        multirun = hydra.core.hydra_config.HydraConfig.get().mode.name == "MULTIRUN"
        try:
            with known_lines_left_out():
                job(OmegaConf.to_container(composed, resolve=True), root)
        except UserError as error:  # here, because Hydra would print a traceback
            if not multirun:
                fail(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed.append(str(error))
            return str(error)  # a job of a queue has a process of its own: this tells the one that waits
        return None

    try:
        hydra.main(version_base="1.3", config_path=str(configs), config_name=config)(task)()
    except HydraException as error:
        raise composition_error(error, configs, config) from None


def fail(error: UserError) -> None:
    """Prints the error's one line and exits with status 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_STATUS)
