"""What budgets count of a source's schemes, found: bytes by arithmetic, seconds from a table of this card."""

from __future__ import annotations

import re
from pathlib import Path

from layerbits.checkpoint.sizes import with_sizes
from layerbits.checkpoint.times import with_times
from layerbits.errors import Skipped, UserError
from layerbits.export.target import NO_TARGET, THIS_MACHINE
from layerbits.history.derived import artifact
from layerbits.history.source import connect, get_run
from layerbits.paths import names_file
from layerbits.schemes.budget_kinds import Counted, Measure
from layerbits.schemes.cost_table import FILE, MEASURE, CostTable
from layerbits.schemes.source import Source
from layerbits.serving.environment import Environment, find_environment

_CPU = "cpu"


def measuring(uri: str | None, root: Path, target: str = NO_TARGET) -> Measure:
    """Gives sources what budgets count.

    Args:
        uri: The store that runs of costs are read from.
        root: The project's folder.
        target: The GPU that will serve, as users name it; ``none`` and ``auto`` are the one of this machine.

    Returns:
        What raises :class:`UserError` where there is no such table, or where it is of another card or vLLM.
    """

    def measure(source: Source, counted: Counted) -> Source:
        table = None
        if counted.timed is not None:
            table = find_costs(counted.timed.costs, uri)
            check_costs(table, target, _installed(root))
            table.step(counted.timed.step)  # before the model is looked at
        if counted.load is not None:
            source = with_sizes(source, counted.load)
        return source if table is None or counted.timed is None else with_times(source, counted.timed.step, table)

    return measure


def find_costs(reference: str, uri: str | None) -> CostTable:
    """A table of costs.

    Args:
        reference: Its file, the folder that it is in, or the run that measured it.
        uri: The store of the run.

    Raises:
        UserError: There is none.
    """
    if names_file(reference):
        return CostTable.load(reference)
    kind = get_run(connect(uri), reference).tags.get("layerbits.kind") or "sensitivity"
    if kind != "costs":
        raise UserError(f"run {reference} is a run of kind {kind}, which measures no costs; {MEASURE}")
    return CostTable.from_text(artifact(reference, FILE, uri), f"{FILE} of run {reference}")


def check_costs(table: CostTable, target: str, installed: Environment | None) -> None:
    """Checks that a table is of the card and the vLLM that will serve, as far as these are known.

    Args:
        table: What was measured.
        target: The GPU, as users name it.
        installed: The vLLM at hand.

    Raises:
        UserError: It is of others.
    """
    if target not in (NO_TARGET, THIS_MACHINE):
        if target.lower() not in re.findall(r"[a-z0-9]+", table.device.lower()):
            raise UserError(f"the costs were measured on {table.device}, and target={target}; {MEASURE} there")
        return
    here = card()
    if here is not None and here != table.device:
        raise UserError(
            f"the costs were measured on {table.device}, and this machine has {here}; {MEASURE} here, or name the GPU "
            "that will serve with target="
        )
    if installed is not None and installed.on_cpu == (table.device == _CPU) and installed.version != table.version:
        raise UserError(
            f"the costs were measured with {table.package} {table.version}, and {installed.package} "
            f"{installed.version} is installed here; {MEASURE} again"
        )


def card() -> str | None:
    """Name of the first GPU that PyTorch sees; ``None`` without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _installed(root: Path) -> Environment | None:
    try:
        return find_environment(None, root)
    except Skipped:
        return None
