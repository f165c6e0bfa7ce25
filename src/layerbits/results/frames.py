"""Tidy frames as the figures need them (no matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from layerbits.results.result import KINDS, FloatArray, SensitivityResult

_PREDICTED = ("predicted_kl", "low", "high")


@dataclass(frozen=True)
class Grid:
    """One candidate of a tidy frame as kind × block.

    Attributes:
        kinds: Kinds that occur, in block order.
        blocks: Block numbers that occur, ascending; ``None`` last, for groups outside the blocks.
        values: ``[kinds, blocks]``, NaN where absent or not finite; groups that share a cell are summed.
        present: Where there is a group.
        chosen: Where the solver quantized every group of the cell with this candidate.
        unusable: Layers whose value is not finite, or not believable.
        beyond: Those that are not believable.
    """

    kinds: tuple[str, ...]
    blocks: tuple[int | None, ...]
    values: FloatArray
    present: npt.NDArray[np.bool_]
    chosen: npt.NDArray[np.bool_]
    unusable: tuple[str, ...]
    beyond: tuple[str, ...] = ()


def tidy(result: SensitivityResult) -> pd.DataFrame:
    """The rows of a result as a frame.

    Without ``chosen`` where the assignment is not known; with ``low`` and ``high`` (of the predicted KL), ``rank_low``,
    ``rank_high`` and ``tied`` where intervals are; with ``believable`` where the baseline is.
    """
    frame = pd.DataFrame(result.rows())
    if not result.allocation.assignment:
        frame = frame.drop(columns="chosen")
    return frame


def by_candidate(frame: pd.DataFrame, value: str) -> dict[str, pd.DataFrame]:
    """The frame split by candidate, in order of appearance.

    Raises:
        ValueError: A column is missing, there is nothing to draw, or one candidate has a layer twice (rows of several
            runs were mixed).
    """
    missing = {"block", "kind", "layer", value} - set(frame.columns)
    if missing:
        raise ValueError(f"the frame lacks the columns {', '.join(sorted(missing))}; it has {', '.join(frame.columns)}")
    if frame.empty:
        raise ValueError("the frame has no rows; check the filter that made it")
    if "candidate" not in frame:
        parts = {"": frame}
    else:
        names: Sequence[Hashable] = list(dict.fromkeys(frame["candidate"]))
        parts = {str(name): frame[frame["candidate"] == name] for name in names}
    for name, part in parts.items():
        if part["layer"].duplicated().any():
            raise ValueError(f"candidate {name!r} has a layer twice; give the rows of one run, or a frame per run")
    return parts


def one_candidate(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """The frame, checked to hold one candidate.

    Raises:
        ValueError: It holds several, or :func:`by_candidate` refuses it.
    """
    parts = by_candidate(frame, value)
    if len(parts) > 1:
        raise ValueError(f"the frame holds the candidates {', '.join(parts)}; select the rows of one")
    return frame


def knows_choice(frame: pd.DataFrame) -> bool:
    """Whether the frame says of each group if the recipe quantized it."""
    return "chosen" in frame and bool(frame["chosen"].notna().all())


def grids(frame: pd.DataFrame, value: str) -> dict[str, Grid]:
    """Each candidate of a frame as kind × block (raises what :func:`by_candidate` does)."""
    return {name: grid(part, value) for name, part in by_candidate(frame, value).items()}


def grid(frame: pd.DataFrame, value: str) -> Grid:
    """One candidate as kind × block (see :class:`Grid`)."""
    numbers = numeric(frame["block"])
    inside = sorted({int(b) for b in numbers if np.isfinite(b)})
    blocks: tuple[int | None, ...] = (*inside, *([None] if np.isnan(numbers).any() else []))
    kinds = tuple(k for k in KINDS if k in set(frame["kind"]))
    shape = len(kinds), len(blocks)
    values, present, chosen = np.zeros(shape), np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    row = {k: i for i, k in enumerate(kinds)}
    column = {b: i for i, b in enumerate(blocks)}
    amounts = drawable(frame, value)
    picked = frame["chosen"].to_numpy(dtype=bool) if knows_choice(frame) else np.zeros(len(frame), dtype=bool)
    for kind, number, amount, pick in zip(frame["kind"], numbers, amounts, picked, strict=True):
        at = row[kind], column[None if np.isnan(number) else int(number)]
        values[at] += amount
        present[at] = True
        chosen[at] &= pick
    values[~present | ~np.isfinite(values)] = np.nan
    unusable = tuple(str(layer) for layer in frame["layer"][~np.isfinite(amounts)])
    beyond = tuple(layer for layer in unusable if layer in set(not_believable(frame, value)))
    return Grid(kinds, blocks, values, present, chosen & present, unusable, beyond)


def not_believable(frame: pd.DataFrame, value: str) -> list[str]:
    """Layers whose predicted KL is not believable; of other values, and of frames that do not say, none."""
    if value not in _PREDICTED or "believable" not in frame:
        return []
    return [str(layer) for layer in frame["layer"][frame["believable"].eq(False).fillna(False)]]


def left_out(unusable: Sequence[str], beyond: Sequence[str]) -> str:
    """Why some layers are not drawn, for a legend.

    Args:
        unusable: All of them.
        beyond: Those of them whose predicted KL is not believable.
    """
    parts = {"not finite": [layer for layer in unusable if layer not in set(beyond)], "not believable": list(beyond)}
    return "; ".join(f"{why}: {listed(layers)}" for why, layers in parts.items() if layers)


def drawable(frame: pd.DataFrame, value: str) -> FloatArray:
    """A column as floats, NaN also where a predicted KL is not believable: it is never drawn as if it were."""
    amounts = numeric(frame[value])
    return np.where(frame["layer"].isin(not_believable(frame, value)), np.nan, amounts)


def numeric(column: pd.Series) -> FloatArray:
    """A column as floats; what is missing or no number becomes NaN."""
    return np.asarray(pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan))


def descending(values: FloatArray) -> npt.NDArray[np.int64]:
    """Positions of the finite values, largest first, ties in their order."""
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")
    return order[: int(np.isfinite(values).sum())]


def groups_for_share(values: FloatArray, share: float = 0.9) -> int:
    """How many of the largest values reach that share of their sum; 0 where the sum is not positive.

    Args:
        values: ``[n]``; what is not finite or negative counts as nothing.
        share: Between 0 and 1.
    """
    running = np.cumsum(np.maximum(values[descending(values)], 0.0))
    if not running.size or running[-1] <= 0:
        return 0
    # The rounding of a sum must not ask for one group more.
    return int(np.searchsorted(running, share * running[-1] * (1 - 1e-12))) + 1


def spearman(x: FloatArray, y: FloatArray) -> float:
    """Spearman's rank correlation of finite values, ties at their mean rank; NaN below 3 points or without spread."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(pd.Series(x).rank(), pd.Series(y).rank())[0, 1])


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Names in words: the first few, then how many more."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
