"""What a model is given of pictures, and the features that its vision tower makes of them, made once per row.

The models of ``transformers`` make image features in ``get_image_features``, whose first argument is the pixels. While
features are kept, that method is replaced: it computes the features of a row when it first sees the row, and afterwards
hands out what it made. Everything else (where the features go, positions, masks, features that enter again at later
blocks) stays the model's own business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch

from layerbits.inputs.calibration import Batch, PictureRow, Segment
from layerbits.inputs.kinds import outside_of_language_model
from layerbits.inputs.models import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIXELS = "pixel_values"
Features = torch.Tensor | Sequence[torch.Tensor]
"""Of all rows in one tensor, or one for each picture or each layer."""
_METHOD = "get_image_features"
_ROWS = "layerbits_rows"
"""Attribute of the tensor of pixels: the rows that it holds. It is how the method knows them."""


def picture_inputs(model: PreTrainedModel, segment: Segment) -> dict[str, torch.Tensor]:
    """Further arguments of a forward for the pictures of a segment; none where it has none."""
    if not segment.pictures:
        return {}
    weight = model.get_input_embeddings().weight
    kept = _kept_by(model)
    known = kept is not None and kept.has(segment.pictures, weight.dtype)

    def given(name: str) -> torch.Tensor:
        parts = [row.inputs[name] for row in segment.pictures]
        dtype = weight.dtype if parts[0].is_floating_point() else parts[0].dtype
        if known and name == PIXELS:  # nobody looks at them again: only their shape travels
            return weight.new_zeros(()).expand(sum(map(len, parts)), *parts[0].shape[1:])
        return torch.cat([part.to(weight.device, dtype) for part in parts])

    made = {name: given(name) for name in segment.pictures[0].inputs}
    pixels = made[PIXELS]
    setattr(pixels, _ROWS, segment.pictures)
    if torch.is_grad_enabled() and kept is None:  # a scored tower has no other way to a gradient
        pixels.requires_grad_()
    return made


def _kept_by(model: PreTrainedModel) -> _Kept | None:
    """What keeps the features of a model; ``None`` where they are made anew."""
    return next((vars(m)[_METHOD] for m in model.modules() if _METHOD in vars(m)), None)


@contextmanager
def kept_features(model: PreTrainedModel, batches: Sequence[Batch], changing: Collection[str] = ()) -> Iterator[None]:
    """While it lasts, a vision tower runs once per row; the features wait in host memory.

    Args:
        model: The whole model.
        batches: What will be run; without a picture among them nothing is done.
        changing: Modules that are scored or replaced meanwhile; nothing is kept where one lies in a vision tower.
    """
    if in_tower(model, changing):
        yield
        return
    holder = next((m for m in model.modules() if hasattr(type(m), _METHOD) and m is not model), None)
    if holder is None or not any(s.pictures for b in batches for s in b.segments):
        yield
        return
    if _METHOD in vars(holder):  # kept already, by who called this
        yield
        return
    setattr(holder, _METHOD, _Kept(getattr(holder, _METHOD)))
    try:
        yield
    finally:
        delattr(holder, _METHOD)


def in_tower(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Those of some modules that lie outside the language model, so that image features depend on them."""
    return outside_of_language_model(model, list(names), output_head(model)) if names else []


class _Output(Protocol):
    """What a vision tower gives back: attributes by name, and its names when it is walked through."""

    def __iter__(self) -> Iterator[str]: ...


class _Kept:
    """``get_image_features`` that remembers."""

    def __init__(self, compute: Callable[..., _Output]) -> None:
        self._compute = compute
        self._signature = inspect.signature(compute)
        self._made: WeakKeyDictionary[PictureRow, dict[torch.dtype, SimpleNamespace]] = WeakKeyDictionary()
        self._last: tuple[Sequence[PictureRow], tuple[torch.device, torch.dtype], SimpleNamespace] | None = None

    def __call__(self, *args: object, **kwargs: object) -> _Output | SimpleNamespace:
        bound = self._signature.bind(*args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        rows = getattr(given[PIXELS], _ROWS, ())
        if not rows:
            return self._compute(*args, **kwargs)
        where = given[PIXELS].device, given[PIXELS].dtype
        if self._last is None or self._last[0] is not rows or self._last[1] != where:
            made = [_mapped(self._of(row, given), lambda t: t.to(where[0])) for row in rows]
            self._last = rows, where, _together(made)
        return self._last[2]

    def has(self, rows: Sequence[PictureRow], dtype: torch.dtype) -> bool:
        """Whether the features of some rows were made already."""
        return all(dtype in self._made.get(row, ()) for row in rows)

    def _of(self, row: PictureRow, given: Mapping[str, torch.Tensor]) -> SimpleNamespace:
        made = self._made.setdefault(row, {})  # by dtype: a model may be measured in several
        dtype = given[PIXELS].dtype
        if dtype not in made:
            own = {name: row.inputs[name].to(v) for name, v in given.items() if name in row.inputs}
            with torch.no_grad():
                made[dtype] = _mapped(_used(self._compute(**{**given, **own})), lambda t: t.cpu())
        return made[dtype]


def _used(output: _Output) -> SimpleNamespace:
    """What a language model takes of a tower's output: the features, and those that enter at later blocks."""
    deep = [name for name in output if "deepstack" in name]
    return SimpleNamespace(**{name: getattr(output, name) for name in ("pooler_output", *deep)})


def _together(outputs: Sequence[SimpleNamespace]) -> SimpleNamespace:
    """Outputs of single rows as that of all of them: features row after row, deepstack features layer by layer."""
    if len(outputs) == 1:
        return outputs[0]
    made: dict[str, Features] = {}
    for name in vars(outputs[0]):
        parts = [getattr(output, name) for output in outputs]
        if isinstance(parts[0], torch.Tensor):
            made[name] = torch.cat(parts)
        elif "deepstack" in name:
            made[name] = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        else:
            made[name] = tuple(features for part in parts for features in part)
    return SimpleNamespace(**made)


def _mapped(output: SimpleNamespace, change: Callable[[torch.Tensor], torch.Tensor]) -> SimpleNamespace:
    """An output with all of its tensors changed."""
    parts = vars(output).items()
    return SimpleNamespace(**{k: change(v) if hasattr(v, "shape") else type(v)(map(change, v)) for k, v in parts})
