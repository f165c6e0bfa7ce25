"""Which linears runtimes run as one, by their names, and what sharing a range means for their quantizers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from layerbits.candidates.linear import Cfg

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_a", "in_proj_b"),
)
"""Linears that runtimes run as one; the last two are of gated delta nets (Qwen3.5's hybrids)."""

SHARED_RANGE = "layerbits_shared_range"
"""Key of ``backend_extra_args``: the weight's range is the largest among the linears that runtimes fuse with it.

ModelOpt keeps those arguments and does nothing with them, so they make a configuration, and its hash, another one.
"""


def fused(modules: Iterable[str]) -> list[list[str]]:
    """Families of modules that runtimes run as one; what is alone is a family of its own."""
    families: dict[tuple[str, object], list[str]] = defaultdict(list)
    for module in dict.fromkeys(modules):
        parent, _, leaf = module.rpartition(".")
        families[parent, next((family for family in FUSED if leaf in family), leaf)].append(module)
    return list(families.values())


def shares_range(cfg: Cfg | TensorQuantizer | QuantizerAttributeConfig) -> bool:
    """Whether a quantizer's settings say that its range is shared, as a mapping or as ModelOpt's own object."""
    extra = cfg.get("backend_extra_args") if isinstance(cfg, Mapping) else getattr(cfg, "backend_extra_args", None)
    return bool((extra or {}).get(SHARED_RANGE))
