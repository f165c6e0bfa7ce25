"""Where a result comes from: versions, hardware, git commit, peak memory."""

from __future__ import annotations

import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = {
    "layerbits": "layerbits",
    "modelopt": "nvidia-modelopt",
    "torch": "torch",
    "transformers": "transformers",
    "mlflow": "mlflow",
}


def provenance(root: Path) -> dict[str, str]:
    """Versions, processor, GPUs and the state of the git checkout at ``root``.

    Returns:
        Plain text values; what is not there is left out.
    """
    facts = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name, package in _PACKAGES.items():
        try:
            facts[f"version.{name}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "version.layerbits" not in facts:  # run from a checkout, not installed
        from layerbits import __version__

        facts["version.layerbits"] = __version__
    return {**facts, **_gpus(), **_git(root)}


def peak_memory() -> dict[str, float]:
    """Peak memory of this process, in GB (1e9 bytes): ``peak_rss_gb`` and, with a GPU, ``peak_gpu_gb``."""
    import torch

    # ru_maxrss is in KiB on Linux
    peaks = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if torch.cuda.is_available():
        peaks["peak_gpu_gb"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 1e9
    return peaks


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "gpu.name": torch.cuda.get_device_name(0),
        "gpu.count": str(torch.cuda.device_count()),
        "version.cuda": str(torch.version.cuda),
    }


def _git(root: Path) -> dict[str, str]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
