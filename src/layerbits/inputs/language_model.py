"""Which part of a model is its language model, by ModelOpt's lineage or by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from layerbits.errors import UserError
from layerbits.inputs.folder import few


def find_language_model(model: Any) -> tuple[str, Any]:
    """The decoder that the output head follows.

    By ModelOpt's lineage of a vision-language model where it knows one. Else by structure: the smallest part of the
    model that holds the token embedding and a list of blocks; a vision tower, a connector or a speech encoder is
    outside of it. A model that has nothing else is its own language model.

    Returns:
        Its name, empty for the whole model, and the module.
    """
    from modelopt.torch.export.model_utils import get_language_model_from_vl

    if lineage := get_language_model_from_vl(model):
        return next(name for name, module in model.named_modules() if module is lineage[-1]), lineage[-1]
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        if _has_blocks(part):
            return (name, part) if _has_more(model, part) else ("", model)
    return "", model


def without_excluded(
    linears: Mapping[str, tuple[int, int]], patterns: Sequence[str], name: str
) -> dict[str, tuple[int, int]]:
    """The linears that no pattern of ``model.exclude`` names, by their own name or that of a module around them.

    Args:
        linears: Full module name → (out_features, in_features).
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
    kept = {
        linear: shape
        for linear, shape in linears.items()
        if not any(fnmatchcase(part, pattern) for part in around[linear] for pattern in patterns)
    }
    if not kept:
        raise UserError(f"model.exclude leaves no linear of {name} to score; exclude fewer")
    return kept


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _linears(module: Any) -> set[Any]:
    import torch

    return {m for m in module.modules() if isinstance(m, torch.nn.Linear)}


def _has_blocks(part: Any) -> bool:
    import torch

    lists = (m for m in part.modules() if isinstance(m, torch.nn.ModuleList))
    return any(any(p.dim() > 1 for p in blocks.parameters()) for blocks in lists)


def _has_more(model: Any, part: Any) -> bool:
    """Whether linears are outside of a part that are not the output head."""
    return bool(_linears(model) - _linears(part) - {model.get_output_embeddings()})
