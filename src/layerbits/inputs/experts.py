"""Expert modules: the experts of a mixture with one 3-D tensor of weights per projection, ``[experts, out, in]``."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Experts:
    """What ModelOpt's AutoQuantize decides on as a whole.

    Attributes:
        count: Experts.
        projections: Names of the weight tensors in the order in which they are used: ``gate_up_proj`` (or ``up_proj``
            of experts without a gate) and ``down_proj``.
        shapes: ``(out_features, in_features)`` of one expert's weight, per projection.
    """

    count: int
    projections: tuple[str, str]
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """Number of weights of all experts."""
        return self.count * sum(rows * width for rows, width in self.shapes)


def fused_experts(module: nn.Module) -> Experts | None:
    """Whether ModelOpt's AutoQuantize takes a module for one decision over experts.

    By ModelOpt's own rule (``plugins/huggingface.py``): a count of experts and 3-D projections, and no quantized class
    of another kind for it (gpt-oss, Llama 4 and DBRX have one, which AutoQuantize makes no decision for).
    """
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins import huggingface

    if isinstance(module, huggingface._QuantFusedExperts):
        wrapper = type(module)
    else:
        wrapper = huggingface._fused_experts_wrapper_class(module)
        known = QuantModuleRegistry.get(type(module))
        if wrapper is None or (known is not None and not issubclass(known, huggingface._QuantFusedExperts)):
            return None
    names = (wrapper._first_proj_attr, "down_proj")
    weights = [getattr(module, name) for name in names]
    return Experts(
        count=len(weights[0]),
        projections=names,
        shapes=tuple((int(w.shape[1]), int(w.shape[2])) for w in weights),
    )


def is_routed(name: str) -> bool:
    """Whether a module's name is that of routed experts, by ModelOpt's rule for its cost model."""
    from modelopt.torch.quantization._auto_quantize_cost import is_routed_moe_module_name

    return bool(is_routed_moe_module_name(name))


def active_ratio(config: PreTrainedConfig) -> float | None:
    """Share of the routed experts that a token uses, from a ``transformers`` config as ModelOpt reads it.

    Returns:
        In (0, 1]; ``None`` where the config does not say.
    """
    from modelopt.torch.quantization._auto_quantize_cost import infer_active_moe_expert_ratio

    ratio = infer_active_moe_expert_ratio(SimpleNamespace(config=config))
    return None if ratio is None else float(ratio)


def named_experts(model: nn.Module) -> dict[str, Experts]:
    """The expert modules of a model by full name, in model order."""
    modules = ((name, fused_experts(module)) for name, module in model.named_modules())
    return {name: experts for name, experts in modules if experts is not None}


def expert_notes(model: nn.Module) -> tuple[str, ...]:
    """What a user should know about how our engine runs the experts of a model, a line each.

    Args:
        model: The whole model.
    """
    one_by_one: dict[str, None] = {}
    switched: dict[str, None] = {}
    for module in map(model.get_submodule, named_experts(model)):
        if hasattr(module, "has_gate"):  # made by transformers' use_experts_implementation
            switched[str(getattr(module.config, "_experts_implementation", None))] = None
        else:
            one_by_one[type(module).__name__] = None
    notes = [f"{kind} has no grouped forward: its experts run one after the other, slowly" for kind in one_by_one]
    others = [name for name in switched if name not in ("grouped_mm", "None")]
    notes += [f"the scored experts run as grouped_mm, not as experts_implementation={name}" for name in others]
    return tuple(notes)
