"""Which part of a model is its language model, by ModelOpt's lineage or by structure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from layerbits.errors import UserError
from layerbits.inputs.files import few

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER_SENSES = ("vision_config", "audio_config", "speech_config", "video_config")


def find_language_model(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The decoder that the output head follows.

    By ModelOpt's lineage of a vision-language model where it knows one. Else, in a model that also sees or hears, by
    structure: the smallest part that holds the token embedding and a list of blocks; its connector and its encoders are
    outside. A model that only reads is its own language model.

    Returns:
        Its name, empty for the whole model, and the module.
    """
    from modelopt.torch.export.model_utils import get_language_model_from_vl

    if lineage := get_language_model_from_vl(model):
        return next(name for name, module in model.named_modules() if module is lineage[-1]), lineage[-1]
    embedding = model.get_input_embeddings()
    foreign = _image_parts(model, embedding)
    if not any(getattr(model.config, part, None) is not None for part in _OTHER_SENSES) and not foreign:
        return "", model
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        if _has_blocks(part := model.get_submodule(name)):
            return name, part
    return "", model


def foreign_parts(model: PreTrainedModel) -> list[str]:
    """Names of what is inside a language model and none of it: encoders of images beside its blocks.

    Args:
        model: The whole model.
    """
    prefix, language_model = find_language_model(model)
    return [
        f"{prefix}.{name}" if prefix else name for name in _image_parts(language_model, model.get_input_embeddings())
    ]


def _image_parts(part: nn.Module, embedding: nn.Module) -> list[str]:
    """The largest parts with a convolution over two or three dimensions and without the token embedding."""
    kinds = (nn.Conv2d, nn.Conv3d)
    names: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if not any(isinstance(m, kinds) for m in child.modules()):
                continue
            if any(m is embedding for m in child.modules()):
                visit(full, child)
            else:
                names.append(full)

    visit("", part)
    return names


def without_excluded(linears: Sequence[str], patterns: Sequence[str], name: str) -> list[str]:
    """The linears that no pattern of ``model.exclude`` names, by their own name or that of a module around them.

    Args:
        linears: Full module names.
        patterns: With ``*`` and ``?`` as in file names.
        name: Of the model, for the error.

    Raises:
        UserError: A pattern names none of them, or none is left.
    """
    around = {linear: _ancestors(linear) for linear in linears}
    for pattern in patterns:
        if not any(fnmatchcase(part, pattern) for parts in around.values() for part in parts):
            raise UserError(
                f"model.exclude names {pattern}, which is no linear of {name} and no module around one; its linears "
                f"are {few(list(linears))}"
            )
    kept = [
        linear
        for linear, parts in around.items()
        if not any(fnmatchcase(part, pattern) for part in parts for pattern in patterns)
    ]
    if not kept:
        raise UserError(f"model.exclude leaves no linear of {name} to score; exclude fewer")
    return kept


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _has_blocks(part: nn.Module) -> bool:
    lists = (m for m in part.modules() if isinstance(m, nn.ModuleList))
    return any(any(p.dim() > 1 for p in blocks.parameters()) for blocks in lists)
