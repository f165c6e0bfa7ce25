"""A layout: which tensors of a module hold a quantized weight, and what their numbers mean.

A weight is its unpacked values times ``scale`` (one for the tensor, one per row, or one per block of a row), and where
there is one times ``second``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scale:
    """A stored scale.

    Attributes:
        part: Name of the tensor in its module.
        divisor: Range / the factor that it stands for; ``None`` = it is made by another rule.
        dtype: As torch names it; ``uint8`` is an exponent of two with bias 127 (OCP Microscaling Formats 1.0, E8M0).
        inverse: Whether the reciprocal of the factor is stored.
        keepdim: Whether a last dimension of one is kept: ``[1]`` and ``[rows, 1]`` for ``[]`` and ``[rows]``.
    """

    part: str
    divisor: float | None
    dtype: str = "float32"
    inverse: bool = False
    keepdim: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return dtype_named(self.dtype)

    @property
    def rounding(self) -> float:
        """Half a unit in the last place of its dtype, relative."""
        import torch

        return torch.finfo(self.torch_dtype).eps / 2

    def shape(self, rows: int, columns: int, block: int | None) -> tuple[int, ...]:
        """Its shape for a weight ``[rows, columns]``; a scale per ``block`` columns (0: per row, ``None``: one)."""
        if block:
            return rows, columns // block
        return (() if block is None else (rows,)) + ((1,) if self.keepdim else ())

    def stored(self, amax: torch.Tensor) -> torch.Tensor:
        """What is stored for a range, in the shape of ``amax``; 1 where the range is zero."""
        import torch

        assert self.divisor is not None
        amax = amax.float()
        divisor = torch.full_like(amax, self.divisor)
        exact = divisor / amax if self.inverse else amax / divisor
        return torch.where(amax > 0, exact, 1.0).to(self.torch_dtype)

    def range(self, stored: torch.Tensor) -> torch.Tensor:
        """The range that stored numbers stand for, float32."""
        import torch

        assert self.divisor is not None
        divisor = torch.full_like(stored, self.divisor, dtype=torch.float32)
        return divisor / stored.float() if self.inverse else stored.float() * divisor

    def factor(self, stored: torch.Tensor, block: int | None = None) -> torch.Tensor:
        """What stored numbers multiply with, float32: a scalar, ``[rows]`` or ``[rows, blocks]``."""
        import torch

        if stored.dtype == torch.uint8:
            return torch.exp2(stored.float() - 127.0)
        factor = 1.0 / stored.float() if self.inverse else stored.float()
        return factor.squeeze(-1) if self.keepdim and not block else factor


@dataclass(frozen=True)
class Layout:
    """How a quantized weight is stored.

    Attributes:
        tensor: Name of the tensor that holds the values.
        dtype: Its dtype, as torch names it.
        packed: Rows and columns in one stored element.
        unpack: Stored rows → values, float32 ``[rows, columns]``.
        block: Columns that share a scale; 0 = one scale per row, ``None`` = one for all.
        scale: Of the tensor, the rows or the blocks.
        second: Multiplies the scales of the blocks; ``None`` = there is none.
        with_shape: Whether a tensor ``weight_shape`` says how many rows and columns there are.
    """

    tensor: str
    dtype: str
    packed: tuple[int, int]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    block: int | None
    scale: Scale
    second: Scale | None = None
    with_shape: bool = False

    @property
    def ranged(self) -> Scale | None:
        """The scale that is made of a calibrated range, ``None`` where all are made of the blocks themselves."""
        return next((s for s in (self.second, self.scale) if s is not None and s.divisor is not None), None)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the weight in a stored tensor."""
        return stored[0] * self.packed[0], stored[1] * self.packed[1]

    def parts(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of a weight ``[rows, columns]``: name → dtype and shape."""
        import torch

        made = {
            self.tensor: (dtype_named(self.dtype), (rows // self.packed[0], columns // self.packed[1])),
            self.scale.part: (self.scale.torch_dtype, self.scale.shape(rows, columns, self.block)),
        }
        if self.second is not None:
            made[self.second.part] = (self.second.torch_dtype, self.second.shape(rows, columns, None))
        if self.with_shape:
            made["weight_shape"] = (torch.int64, (2,))
        return made


def dtype_named(name: str) -> torch.dtype:
    """The dtype that torch names so."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
