"""Names of parameters in memory and in the checkpoint files, which ``transformers`` lets differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from layerbits.inputs.experts import named_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def names_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """Name in the checkpoint for each name in ``model.state_dict()``, by transformers' own conversion.

    The tensors of expert modules are left out: files have several names for each (:mod:`layerbits.checkpoint.experts`).

    Args:
        model: Not yet quantized. One loaded by ``from_pretrained`` remembers how it was renamed; for another it is the
            renaming of its architecture.
    """
    from transformers.core_model_loading import revert_weight_conversion

    nothing = torch.empty(0, device="meta")
    names = {}
    experts = {f"{name}.{projection}" for name, e in named_experts(model).items() for projection in e.projections}
    for name in model.state_dict():
        if name in experts:
            continue
        renamed = list(revert_weight_conversion(model, {name: nothing}))
        names[name] = renamed[0] if len(renamed) == 1 else name
    return names
