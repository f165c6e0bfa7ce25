"""Parameters that are one tensor under several names: whether the files agree, and what that means for scores."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from layerbits.errors import UserError
from layerbits.inputs.files import few
from layerbits.inputs.names import names_on_disk
from layerbits.inputs.weights import read_header, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # that are compared at once


def tied_parameters(model: PreTrainedModel) -> list[list[str]]:
    """Names in memory of the parameters that are one tensor, a list for each such tensor.

    By what the architecture and its config say, and by what is one object: on the meta device the first is not done.
    """
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    together: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one = ties.get(name) or first.setdefault(id(parameter), name)
        together.setdefault(one, []).append(name)
    return [names for names in together.values() if len(names) > 1]


def check_stored_ties(model: PreTrainedModel, folder: Path) -> None:
    """Checks that what a config ties is one tensor in the files too, or has the same numbers.

    Args:
        model: On the meta device.
        folder: Its checkpoint, of safetensors.

    Raises:
        UserError: The files have two tensors of other numbers where the config says one.
    """
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    if not ties:
        return
    home = {name: file for file in weight_files(folder) for name in read_header(file)}
    stored = names_on_disk(model)
    for target, source in ties.items():
        one, other = stored.get(target, target), stored.get(source, source)
        if one in home and other in home and not _same_numbers(home[one], one, home[other], other):
            raise _two_tensors(str(folder), one, other)


def check_loaded_ties(model: PreTrainedModel, source: str) -> None:
    """The same of a loaded model, in which ``transformers`` leaves such tensors untied.

    Raises:
        UserError: It did.
    """
    expected = getattr(model, "get_expanded_tied_weights_keys", None)
    for target, other in (expected(all_submodels=True) if expected else {}).items():
        if model.get_parameter(target) is not model.get_parameter(other):
            raise _two_tensors(source, target, other)


def tied_linears(model: PreTrainedModel, linears: Iterable[str]) -> list[str]:
    """What a reader of scores should know of scored linears that share their weights, a line for each kind of sharing.

    Args:
        model: The whole model.
        linears: Names of what is scored.
    """
    scored = set(linears)
    groups = [[name.rpartition(".")[0] for name in names] for names in tied_parameters(model)]
    groups = [modules for modules in groups if scored.intersection(modules)]
    if not groups:
        return []
    heads = [modules for modules in groups if any(_is_embedding(model, module) for module in modules)]
    notes = []
    if heads:
        notes.append(
            f"{heads[0][-1]} is {heads[0][0]}, one tensor: it is scored where it makes the logits, and an export "
            "cannot quantize it (model.lm_head=false leaves it out)"
        )
    if blocks := [modules for modules in groups if modules not in heads]:
        more = f" (and {len(blocks) - 1} more such tensors)" if len(blocks) > 1 else ""
        notes.append(
            f"{few(blocks[0], 4)} are one tensor in {len(blocks[0])} places{more}: each place is scored alone, and an "
            "export cannot quantize one of them without the others (model.exclude leaves them out)"
        )
    return notes


def _is_embedding(model: PreTrainedModel, module: str) -> bool:
    return isinstance(model.get_submodule(module), nn.Embedding)


def _same_numbers(file: Path, name: str, other_file: Path, other_name: str) -> bool:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as one, safe_open(other_file, framework="pt") as other:
        a, b = one.get_slice(name), other.get_slice(other_name)
        if a.get_shape() != b.get_shape():
            return False
        rows = a.get_shape()[0]
        return all(bool((a[at : at + _ROWS] == b[at : at + _ROWS]).all()) for at in range(0, rows, _ROWS))


def _two_tensors(source: str, one: str, other: str) -> UserError:
    key = "tie_word_embeddings=true" if "head" in one or "embed" in other else "that they are tied"
    return UserError(
        f"{source} has {one} and {other} as two tensors of different numbers, and its config.json says {key}: set "
        "tie_word_embeddings to false there if the model was trained with both, or remove the one that is not its own"
    )
