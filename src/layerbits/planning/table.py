"""Seconds of a pass from a table: what a card takes per piece of work, fitted to passes that were measured on it.

The work of a step is of five kinds: tokens × the weights that they meet × matrix products (forward, backward, one a
candidate); tokens × features that the scored modules read and write, which is memory traffic, once for the model and
once a candidate; weights that are quantized in each step because no copies of them are kept; and logits, of which the
loss is made. That of calibration is tokens × weights, tokens × features, and once a pass the ranges of all weights.
Where a batch is small, the host takes longer to launch the kernels of a block than the card to run them; then the step
takes what the host takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from layerbits.plain import JsonObject

if TYPE_CHECKING:
    from layerbits.scoring.memory import MemoryPlan, Needs

_AGAIN = 0.37
"""What recomputing a block's forward adds to forward and backward: 0.298 s against 0.218 s
(``benchmarks/results/2026-11-21-one-pass-h200.json``)."""


@dataclass(frozen=True)
class Card:
    """A row of the table, made by ``benchmarks/plan_records.py --write``.

    Attributes:
        name: Of the GPU. memory_gb: What a process may take of it.
        copy_gb_per_second: From page-locked host memory.
        step: Seconds per unit of each kind of :func:`step_work`.
        launch: Seconds that its host takes for the kernels of a block in a step, with four candidates: where
            activations are kept, and where they are made again.
        calibrate: Seconds per unit of each kind of :func:`calibration_work`.
        once: Seconds per weight and pass.
        records: Files that the row is from.
    """

    name: str
    memory_gb: float
    copy_gb_per_second: float
    step: tuple[float, ...]
    launch: tuple[float, float]
    calibrate: tuple[float, ...]
    once: float
    records: tuple[str, ...]

    @classmethod
    def read(cls) -> Card:
        """The row that comes with the package."""
        text = resources.files("layerbits").joinpath("data/step_costs.json").read_text("utf-8")
        values: JsonObject = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return cls(**values)

    def seconds(self, needs: Needs, memory: MemoryPlan, tokens: int, candidates: int, settings: int) -> Seconds:
        """What a pass takes.

        Args:
            needs: Of the pass.
            memory: How it is run.
            tokens: Of a batch.
            candidates: How many are scored together.
            settings: Their distinct weight quantizers.
        """
        step = _dot(self.step, step_work(needs, memory, tokens, candidates, settings))
        step = max(step, needs.kept.blocks * self.launch[memory.mode != "fast"])
        calibrate = _dot(self.calibrate, calibration_work(needs, tokens))
        once = self.once * needs.weights.count
        if memory.mode == "offload":  # every block is copied once a forward, a backward, and for its weights' ranges
            copy = (needs.model.whole - needs.model.resident) / 1e9 / self.copy_gb_per_second
            step, calibrate, once = max(step, 2 * copy), max(calibrate, copy), max(once, copy)
        return Seconds(step, calibrate, once)


@dataclass(frozen=True)
class Seconds:
    """Seconds of a pass.

    Attributes:
        step: To score a batch. calibrate: To calibrate on a batch. once: Whatever the number of batches.
    """

    step: float
    calibrate: float
    once: float

    def total(self, steps: float, calibrations: float) -> float:
        """Of a pass over some batches."""
        return self.step * steps + self.calibrate * calibrations + self.once


def _dot(seconds: tuple[float, ...], work: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(seconds, work, strict=True))


def step_work(needs: Needs, memory: MemoryPlan, tokens: int, candidates: int, settings: int) -> tuple[float, ...]:
    """The work of scoring a batch, by kind; arguments as of :meth:`Card.seconds`."""
    from layerbits.scoring.memory import LOGIT

    again = memory.mode != "fast"
    linears = 0 if memory.keep_weights else needs.weights.count - needs.weights.experts
    made = linears + (0 if memory.keep_experts else needs.weights.experts)
    return (
        float(tokens * needs.weights.active * (2 + again + candidates)),
        tokens * needs.weights.features * (1 + _AGAIN * again),
        float(tokens * needs.weights.features * candidates),
        float(settings * made),
        needs.loss.whole / LOGIT,
    )


def calibration_work(needs: Needs, tokens: int) -> tuple[float, ...]:
    """The work of a calibration batch, by kind."""
    return float(tokens * needs.weights.active), float(tokens * needs.weights.features)
