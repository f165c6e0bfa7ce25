"""What a serve check leaves open of a model that sees pictures: it asks in plain text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.results.result import VISION_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from layerbits.schemes import Scheme


def left_open(scheme: Scheme, config: PreTrainedConfig) -> str:
    """What was not asked, in words; empty for a model that reads text alone.

    Args:
        scheme: What is served.
        config: Of its model.
    """
    if getattr(config, "vision_config", None) is None:
        return ""
    chosen = zip(scheme.groups, scheme.assignment, strict=True)
    tower = sum(group.kind in VISION_KINDS for group, name in chosen if name is not None)
    groups = f"{tower} group{'s' * (tower > 1)}"
    more = f", nor the vision tower, of which the scheme quantizes {groups}" if tower else ""
    return f"asked in plain text alone: how vLLM serves pictures is not checked{more}"
