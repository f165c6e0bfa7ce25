"""Names of routed experts in checkpoints; read without torch."""

from __future__ import annotations


def expert_module(name: str) -> str:
    """Name of the module of routed experts that a linear or tensor is of; empty where it is of none."""
    before, found, _ = f"{name}.".rpartition(".experts.")
    return f"{before}.experts" if found else ""
