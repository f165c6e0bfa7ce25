"""The pairs and overlays that come with the project, from its ``configs/``."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.linear import WEIGHT
from layerbits.errors import UserError


def shipped_configs() -> Path:
    """The folder ``configs`` of the project: of the clone that this module lies in, or the current one.

    Raises:
        UserError: There is neither, as where the package was installed without the project.
    """
    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "configs" / "quant_pair").is_dir():
            return root / "configs"
    raise UserError("the pairs and granularities lie in configs/ of the project; run this in a clone of it")


def load_pairs() -> list[QuantPair]:
    """The shipped quant pairs, by weight, then activation precision."""
    files = (shipped_configs() / "quant_pair").glob("*.yaml")
    pairs = [QuantPair.from_mapping(yaml.safe_load(file.read_text("utf-8"))) for file in files]
    order = ("fp4", "int4", "fp8", "int8", "fp16")
    return sorted(pairs, key=lambda p: (p.experimental, order.index(p.weight), -order.index(p.activation), p.name))


def load_overlays() -> list[Overlay]:
    """The shipped overlays: ``default``, those of weights, of activations, of both; groups by size."""
    files = (shipped_configs() / "quant_granularity").glob("*.yaml")
    overlays = [Overlay.from_mapping(yaml.safe_load(p.read_text("utf-8"))) for p in files]

    def key(overlay: Overlay) -> tuple[int, bool, list[int | str]]:
        words = [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", overlay.name)]
        return len(overlay.quant_cfg_overrides), list(overlay.quant_cfg_overrides) != [f"*{WEIGHT}"], words

    return sorted(overlays, key=key)
