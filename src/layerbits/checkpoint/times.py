"""Seconds of a step under a source's schemes, from a table of costs: which linears a group is in vLLM, and as what."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from layerbits.checkpoint.label import FORMATS, MODELOPT, Label
from layerbits.checkpoint.runtimes import only_alone, reads
from layerbits.checkpoint.sizes import scored_model
from layerbits.errors import UserError
from layerbits.results.result import VISION_KINDS, CandidateInfo, Group
from layerbits.schemes.cost_table import MEASURE, PLAIN, CostTable, Step
from layerbits.schemes.times import Times

if TYPE_CHECKING:
    from layerbits.inputs.models import Shapes
    from layerbits.schemes.source import Source

Shape = tuple[int, int]
"""``(out_features, in_features)`` of a weight."""


def with_times(source: Source, step: Step, table: CostTable) -> Source:
    """A source whose schemes can be measured in seconds; the model's config is read, and no weight is.

    Raises:
        UserError: The scores do not say how to find the model, it has changed since, or as :func:`times_of`.
    """
    _, _, linears = scored_model(source, "costs")
    return replace(source, times=times_of(linears, source, step, table))


def times_of(linears: Mapping[str, Shapes], source: Source, step: Step, table: CostTable) -> Times:
    """The times of a source's schemes.

    Args:
        linears: From :func:`layerbits.inputs.models.scored_linears`.
        source: Groups, candidates and the KV cache.
        step: What is counted.
        table: Of the card.

    Raises:
        UserError: The table lacks the step, a linear or a layout, or is of a model with other linears; or the model has
            routed experts.
    """
    whole = table.step(step)
    shapes = group_shapes(source.groups, linears)
    timed = [as_fused(mine, table.counts) for mine in shapes]
    for group, mine, found in zip(source.groups, shapes, timed, strict=True):
        if found is None:
            sizes = " + ".join(f"{rows} x {columns}" for rows, columns in mine)
            raise UserError(f"the costs have no linear of {group.key} ({sizes}); {MEASURE}")
    _check_model([shape for found in timed for shape in found or ()], table)
    plain = np.array([sum(table.seconds(s, PLAIN, step.tokens) for s in found or ()) for found in timed])
    formats, alone = {}, {}
    refused: dict[str, list[str]] = {info.name: [] for info in source.candidates}
    names = (MODELOPT,) if source.kv_cache == "fp8" else FORMATS
    for format in names:
        columns, single = [], set()
        for info in source.candidates:
            label, why = _runs(info, format, shapes, table)
            single |= {info.name} if label is not None and only_alone(label) else set()
            refused[info.name] += [why] if label is None else []
            columns.append(
                [_seconds(label, a, b or (), step, table) for a, b in zip(shapes, timed, strict=True)]
                if label is not None
                else [math.inf] * len(shapes)
            )
        formats[format], alone[format] = np.column_stack([*columns, plain]), frozenset(single)
    nowhere = {name: words[-1] for name, words in refused.items() if len(words) == len(names)}
    return Times(tuple(c.name for c in source.candidates), formats, whole.median, step, table.where, nowhere, alone)


def group_shapes(groups: Sequence[Group], linears: Mapping[str, Shapes]) -> list[tuple[Shape, ...]]:
    """Per group the weights of its linears; none for the vision tower, which a step on text does not run.

    Raises:
        UserError: A group is of routed experts, or not of the model.
    """
    found: list[tuple[Shape, ...]] = []
    for group in groups:
        if group.kind in VISION_KINDS:
            found.append(())
            continue
        for module in group.modules:
            if module not in linears:
                raise UserError(f"the model has no linear {module}; use the model that was scored")
            if len(linears[module]) > 1:
                raise UserError(
                    f"{group.key} holds routed experts, whose time depends on the routing; use effective_bits or "
                    "budget_gib, without costs"
                )
        found.append(tuple(linears[module][0] for module in group.modules))
    return found


def as_fused(shapes: Sequence[Shape], known: Collection[Shape]) -> tuple[Shape, ...] | None:
    """The linears that vLLM makes of a group's: one of all their rows, or each as it is; ``None`` where it has neither.

    Args:
        shapes: Of the group.
        known: What vLLM has.
    """
    if not shapes:
        return ()
    together = (sum(rows for rows, _ in shapes), shapes[0][1])
    if together in known and len({columns for _, columns in shapes}) == 1:
        return (together,)
    return tuple(shapes) if all(shape in known for shape in shapes) else None


def fits(label: Label, shape: Shape) -> bool:
    """Whether a weight has whole blocks of a layout."""
    layout = label.layout
    return shape[1] % (layout.block or layout.packed[1]) == 0 and shape[0] % layout.packed[0] == 0


def _check_model(shapes: Sequence[Shape], table: CostTable) -> None:
    """Checks that the step that was measured is of a model with as many linears.

    Raises:
        UserError: It had fewer.
    """
    for shape in dict.fromkeys(shapes):
        if shapes.count(shape) > table.counts[shape]:
            raise UserError(
                f"the costs are of {table.model}, which has {table.counts[shape]} linears of {shape[0]} x {shape[1]}, "
                f"and the scored model has {shapes.count(shape)}; {MEASURE}"
            )


def _runs(
    info: CandidateInfo, format: str, shapes: Sequence[Sequence[Shape]], table: CostTable
) -> tuple[Label | None, str]:
    """The label of a candidate that vLLM runs on some groups, or ``None`` and why it does not.

    Raises:
        UserError: The table does not know.
    """
    from layerbits.checkpoint.labels import label_or_reason

    label, _ = label_or_reason(info, format)
    if label is None:
        return None, "it cannot be exported"
    if not reads(label):
        return None, f"vLLM does not read it ({label.algo})"
    if not any(mine and all(fits(label, shape) for shape in mine) for mine in shapes):
        return None, f"no linear has whole blocks of {label.algo}"
    layout = (format, label.algo)
    if layout in table.words:
        return None, f"vLLM does not run {label.algo} on {table.device}: {table.words[layout]}"
    if layout not in table.layouts:
        raise UserError(f"the costs have no times of {info.name} ({format} {label.algo}); {MEASURE}")
    return label, ""


def _seconds(label: Label, own: Sequence[Shape], timed: Sequence[Shape], step: Step, table: CostTable) -> float:
    if not all(fits(label, shape) for shape in own):
        return math.inf
    return sum(table.seconds(shape, (label.format, label.algo), step.tokens) for shape in timed)
