"""Whether every tensor of a model came out of its checkpoint, and every tensor of the checkpoint went in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.inputs.files import few
from layerbits.inputs.prediction_layers import prediction_module
from layerbits.plain import JsonMapping

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_tensors(info: JsonMapping, source: str, config: PreTrainedConfig) -> None:
    """Checks what ``from_pretrained`` reports with ``output_loading_info``; tied tensors are not missing there.

    Layers for multi-token prediction are not part of the model, whether ``transformers`` knows their names or not.

    Args:
        info: Its second answer.
        source: How to name the checkpoint.
        config: The ``transformers`` config.

    Raises:
        UserError: Tensors are missing (transformers would draw them at random), of another shape (likewise), or not
            used.
    """
    problems = []
    if missing := sorted(info.get("missing_keys") or ()):
        problems.append(f"lacks {_tensors(len(missing))} of the model ({few(missing)})")
    if shapes := sorted(info.get("mismatched_keys") or ()):
        named = [f"{name} {list(stored)} instead of {list(wanted)}" for name, stored, wanted in shapes]
        problems.append(f"has {_tensors(len(shapes))} of another shape ({few(named)})")
    unexpected = [n for n in sorted(info.get("unexpected_keys") or ()) if prediction_module(n, config) is None]
    if unexpected:
        problems.append(f"has {_tensors(len(unexpected))} that the model does not use ({few(unexpected)})")
    if errors := list(info.get("error_msgs") or ()):
        problems.append(f"cannot be read in part ({few([str(e) for e in errors], 1)})")
    if problems:
        raise UserError(
            f"{source} {', and '.join(problems)}: its config.json and its weights are not of one model; fetch both "
            "again, or save the model with save_pretrained"
        )


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count > 1)}"
