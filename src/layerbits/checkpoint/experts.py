"""Experts in checkpoint files: a linear for each expert, ``experts.7.gate_proj``, whose rows a model keeps together.

In memory an expert module has one tensor per projection, ``[experts, out, in]``, the gate's rows above those of the
other half. In files every expert has linears of its own, or the tensors are as in memory. ModelOpt writes the former in
either case, under the names that the source has for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from layerbits.checkpoint.reader import Checkpoint, Entry
from layerbits.errors import Unsupported
from layerbits.inputs.experts import Experts, named_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExpertLinear:
    """A linear of one expert.

    Attributes:
        module: Name of the expert module in memory. projection: Name of its tensor there.
        expert: Number of the expert. start, stop: Rows of its weight.
        name: The linear's name in an export.
        source: Name of the tensor in the source that holds it: its own weight, or that of all experts.
    """

    module: str
    projection: str
    expert: int
    start: int
    stop: int
    name: str
    source: str

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its weight in the tensor of all experts, a view."""
        return tensor[self.expert, self.start : self.stop]


def expert_linears(model: PreTrainedModel) -> list[ExpertLinear]:
    """The linears of all experts of a model, by transformers' own conversion of names.

    Raises:
        Unsupported: A checkpoint of this architecture keeps them in another layout.
    """
    linears = []
    for name, experts in named_experts(model).items():
        for projection, (rows, _) in zip(experts.projections, experts.shapes, strict=True):
            linears += _linears(model, name, experts, projection, rows)
    return linears


def split_experts(checkpoint: Checkpoint, linears: Sequence[ExpertLinear]) -> Checkpoint:
    """A checkpoint in which every expert has linears of its own, whatever its files have.

    Args:
        checkpoint: The source.
        linears: From :func:`expert_linears`.

    Raises:
        Unsupported: The tensor of all experts has another shape than in memory.
    """
    entries = dict(checkpoint.entries)
    together = {linear.source for linear in linears if linear.source != f"{linear.name}.weight"}
    rows: dict[str, int] = {}
    for linear in linears:
        if linear.source in together:
            rows[linear.source] = max(rows.get(linear.source, 0), linear.stop)
    for linear in linears:
        if linear.source not in together or linear.source not in checkpoint:
            continue
        whole = checkpoint.entry(linear.source)
        if len(whole.shape) != 3 or whole.shape[1] != rows[linear.source]:
            raise Unsupported(
                f"{linear.source} is stored as {list(whole.shape)}, in memory its experts have "
                f"{rows[linear.source]} rows; save the model with save_pretrained and score it from there"
            )
        entries[f"{linear.name}.weight"] = _part(whole, linear)
    for name in together:
        entries.pop(name, None)
    return replace(checkpoint, entries=entries)


def _part(whole: Entry, linear: ExpertLinear) -> Entry:
    """Rows of one expert: neighbours in the file."""
    _, rows, columns = whole.shape
    stride = (whole.stop - whole.start) // (whole.shape[0] * rows)
    first = whole.start + (linear.expert * rows + linear.start) * stride
    count = linear.stop - linear.start
    return replace(whole, shape=(count, columns), start=first, stop=first + count * stride)


def _linears(model: PreTrainedModel, name: str, experts: Experts, projection: str, rows: int) -> list[ExpertLinear]:
    from transformers.core_model_loading import revert_weight_conversion

    full = f"{name}.{projection}"
    # Every row holds its own number, so that the names can be told apart by what they hold.
    numbered = torch.arange(experts.count * rows).reshape(experts.count, rows, 1)
    held = {key: tensor.flatten().tolist() for key, tensor in revert_weight_conversion(model, {full: numbered}).items()}
    leaves = {"gate_up_proj": ("gate_proj", "up_proj")}.get(projection, (projection,))
    half = rows // len(leaves)
    wanted = [(e, i * half, (i + 1) * half, leaf) for e in range(experts.count) for i, leaf in enumerate(leaves)]
    if len(held) == 1:
        ((source, numbers),) = held.items()
        if numbers != list(range(experts.count * rows)):
            raise Unsupported(f"{full} is stored in another order than it has in memory; it cannot be exported")
        prefix = source.removesuffix(f".{projection}")
        return [ExpertLinear(name, projection, e, a, b, f"{prefix}.{e}.{leaf}", source) for e, a, b, leaf in wanted]
    by_rows: Mapping[tuple[int, ...], str] = {tuple(numbers): key for key, numbers in held.items()}
    linears = []
    for e, a, b, _ in wanted:
        source = by_rows.get(tuple(range(e * rows + a, e * rows + b)), "")
        if not source.endswith(".weight"):
            raise Unsupported(f"{full} is stored in another layout than a linear per expert; it cannot be exported")
        linears.append(ExpertLinear(name, projection, e, a, b, source.removesuffix(".weight"), source))
    return linears
