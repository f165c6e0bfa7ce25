"""What a GPU will compute of an export, said before it is made."""

from __future__ import annotations

from layerbits.checkpoint.gpus import TARGETS, VERSION, generation, kernel
from layerbits.checkpoint.processors import MISSING, OTHERWISE
from layerbits.errors import UserError
from layerbits.export.plan import ExportPlan

NO_TARGET, THIS_MACHINE = "none", "auto"


def find_target(name: str) -> str | None:
    """The generation of the GPU that will serve.

    Args:
        name: A GPU of :data:`layerbits.checkpoint.gpus.TARGETS`, ``auto`` for the one of this machine, or ``none``.

    Returns:
        The generation, or ``None`` for ``none`` and for a machine without an NVIDIA GPU.

    Raises:
        UserError: It is not known.
    """
    if name == NO_TARGET:
        return None
    if name != THIS_MACHINE:
        if name.lower() not in TARGETS:
            raise UserError(f"target={name} is not known; use {', '.join(TARGETS)}, {THIS_MACHINE} or {NO_TARGET}")
        return TARGETS[name.lower()]
    import torch

    return generation(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def differences(plan: ExportPlan, target: str) -> list[str]:
    """A line for each layout of an export that vLLM does not compute as written on a generation of GPUs."""
    lines = []
    for algo in sorted({label.algo for label in plan.labels.values()}):
        found = kernel(plan.format, algo, target)
        if found.computed.state in (OTHERWISE, MISSING):
            by = f" ({found.name})" if found.name else ""
            lines.append(
                f"{plan.scheme.name}: on {target} vLLM {VERSION} does not compute {algo} as it was scored: "
                f"{found.computed.how or 'it has no kernel for it'}{by}; known from {found.source}"
            )
    return lines
