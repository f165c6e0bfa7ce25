"""Several processes of one host, as ``torchrun`` starts them: who does what, and waiting for each other."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process; 0 without ``torchrun``."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(kind: str) -> str:
    """This process's device: its own GPU where there are several processes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" and world() > 1 else kind


def barrier() -> None:
    """Waits until every process is here."""
    if world() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")  # nothing but barriers: results meet on disk
    dist.barrier()
