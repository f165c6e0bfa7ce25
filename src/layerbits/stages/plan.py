"""What one pass will score, on what: everything that is known before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerbits.candidates.candidate import Candidate
from layerbits.candidates.capability import Capability
from layerbits.candidates.formats import plain
from layerbits.config import Settings
from layerbits.inputs.calibration import Calibration
from layerbits.inputs.captions import CaptionSet
from layerbits.inputs.models import ResolvedModel
from layerbits.inputs.picture_rows import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Held:
    """What stays quantized while other linears are scored.

    Attributes:
        modules: Linears or expert modules → their candidate.
        kv_cache: Quantizer settings of keys and values, ``None`` = as they are.
    """

    modules: Mapping[str, tuple[Candidate, Capability]] = field(default_factory=dict)
    kv_cache: Mapping[str, object] | None = None

    def identity(self) -> list[object]:
        """What of it scores depend on, as JSON data; empty where nothing is held."""
        modules = sorted([m, c.info.config_hash, p.fp4_numerics] for m, (c, p) in self.modules.items())
        return [modules, plain(self.kv_cache)] if modules or self.kv_cache else []


@dataclass(frozen=True)
class Plan:
    """Everything that could be checked without loading the model.

    Attributes:
        candidates: What one pass scores together, each with what it needs of this machine.
        scored: Names of the linears that the search may touch.
        fingerprint: Digest of all that the scores depend on (not the budget: that is solved anew).
        active_ratio: Share of the routed experts that a token uses; ``None`` where the model has none.
        held: What stays quantized while the others are scored.
        reader: How pictures become tokens; ``None`` where there are none.
        cells: Candidate name → digest by which a sweep finds the finished run.
    """

    settings: Settings
    candidates: tuple[tuple[Candidate, Capability], ...]
    captions: CaptionSet
    resolved: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    reader: Reader | None
    calibration: Calibration
    scored: tuple[str, ...]
    device: str
    fingerprint: str
    active_ratio: float | None
    cells: Mapping[str, str]
    held: Held = field(default_factory=lambda: Held())

    def warnings(self, capability: Capability) -> tuple[str, ...]:
        """What the user should know before a candidate is scored."""
        return (*self.resolved.warnings, *self.calibration.warnings, *capability.notes)
