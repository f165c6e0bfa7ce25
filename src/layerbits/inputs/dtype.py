"""What a model's numbers are computed in: what the user says, else its config, else what its tensors are stored in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.inputs.weights import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""Of safetensors' names, those of numbers that a model may be computed in."""


def dtype_of(name: str, config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that ``model.dtype`` names; with ``auto`` that of the config, ``None`` where it has none."""
    if name != "auto":
        return _named(name)
    for part in (config, config.get_text_config()):
        if (named := getattr(part, "dtype", None)) is not None:
            return named if isinstance(named, torch.dtype) else _named(str(named))
    return None


def stored_dtype(files: Sequence[Path]) -> torch.dtype | None:
    """The floating dtype of most numbers in some weights files, ``None`` where they hold none."""
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        for dtype, shape in _stored(file):
            if dtype.is_floating_point:
                counts[dtype] += torch.Size(shape).numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def hub_dtype(source: str, revision: str | None) -> torch.dtype | None:
    """The same of a model on the hub, from the headers of its safetensors; ``None`` where they cannot be had."""
    from huggingface_hub import get_safetensors_metadata

    try:
        counts = get_safetensors_metadata(source, revision=revision).parameter_count
    except Exception:  # no network, no safetensors: the hub's client has many words for both
        return None
    counted = {_FLOATS[name]: count for name, count in counts.items() if name in _FLOATS}
    return max(counted, key=lambda dtype: counted[dtype]) if counted else None


def _stored(file: Path) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a file."""
    if file.suffix == ".safetensors":
        for name, shape in read_header(file).values():
            if name in _FLOATS:
                yield _FLOATS[name], shape
        return
    try:
        tensors = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # of an older format: loading says what is wrong, if anything is
        return
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor):
            yield tensor.dtype, tuple(tensor.shape)


def _named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
