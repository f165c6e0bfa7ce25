"""What one pass will score, on what: everything that is known before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerbits.candidates.candidate import Candidate
from layerbits.candidates.capability import Capability
from layerbits.config import Settings
from layerbits.inputs.calibration import Calibration
from layerbits.inputs.captions import CaptionSet
from layerbits.inputs.models import ResolvedModel


@dataclass(frozen=True)
class Plan:
    """Everything that could be checked without loading the model.

    Attributes:
        candidates: What one pass scores together, each with what it needs of this machine.
        scored: Names of the linears that the search may touch.
        fingerprint: Digest of all that the scores depend on (not the budget: that is solved anew).
        active_ratio: Share of the routed experts that a token uses; ``None`` where the model has none.
        held: Linears that stay quantized while the others are scored → their candidate.
        cells: Candidate name → digest by which a sweep finds the finished run.
    """

    settings: Settings
    candidates: tuple[tuple[Candidate, Capability], ...]
    captions: CaptionSet
    resolved: ResolvedModel
    tokenizer: Any
    calibration: Calibration
    scored: tuple[str, ...]
    device: str
    fingerprint: str
    active_ratio: float | None
    cells: Mapping[str, str]
    held: Mapping[str, tuple[Candidate, Capability]] = field(default_factory=dict)

    def warnings(self, capability: Capability) -> tuple[str, ...]:
        """What the user should know before a candidate is scored."""
        return (*self.resolved.warnings, *self.calibration.warnings, *capability.notes)
