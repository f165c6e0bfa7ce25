"""Finished steps of a pass on disk: a killed pass goes on from its last one, several processes share the work."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerbits.atomic import atomic, why_unwritable, write_json
from layerbits.errors import UserError
from layerbits.results.result import FloatArray

Arrays = dict[str, npt.NDArray[Any]]
"""What a file holds, by name."""


@dataclass(frozen=True)
class Step:
    """What one batch contributes.

    Attributes:
        raw: ``[G, C]`` raw scores of the batch.
        samples: ``[s]`` samples that it holds. sample_raw: ``[s, G, C]`` their shares. sample_tokens: ``[s]``.
        bad: ``[n, 3]`` linear, candidate and sample of scores that are not finite.
        loss: Loss of the unquantized model on the batch, nats, summed over its loss tokens.
        kv: ``[attention modules, formats]`` raw scores of the KV cache, where it is scored.
        routed: Tokens per expert, the expert modules one after the other.
        image_raw: ``[s, G, C]`` of ``sample_raw`` what comes from image positions; empty where the rows have none.
    """

    raw: FloatArray
    samples: npt.NDArray[np.int64]
    sample_raw: FloatArray
    sample_tokens: npt.NDArray[np.int64]
    bad: npt.NDArray[np.int64]
    loss: float
    kv: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    routed: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    image_raw: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0)))


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        ranges: Static input ranges by name.
        routed: Tokens per expert, by expert module.
        images: Of inputs with a static range, by module: :class:`layerbits.scoring.modality.ImageInputs` as an array.
    """

    ranges: dict[str, npt.NDArray[np.float32]]
    routed: dict[str, npt.NDArray[np.int64]]
    images: dict[str, FloatArray] = field(default_factory=dict)


_PARTS = ("ranges/", "routed/", "images/")
"""Prefixes of the arrays in a file, in the order of the fields."""


class StepLog:
    """A folder with one file a step, each whole or not there.

    Args:
        folder: Kept by runs with the same fingerprint.
        fingerprint: Digest of everything that the scores depend on.

    Raises:
        UserError: The folder holds steps of other parameters.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        owner = folder / "fingerprint.json"
        with writable(folder):
            if not owner.exists():
                write_json(owner, fingerprint)
        if json.loads(owner.read_text("utf-8")) != fingerprint:
            raise UserError(
                f"the search checkpoint in {folder} was made with other parameters; "
                "give another folder as autoquant.checkpoint or delete it"
            )

    def holds(self, index: int) -> bool:
        """Whether a step is finished."""
        return self.read(index) is not None  # it may be damaged

    def read(self, index: int) -> Step | None:
        """A finished step, ``None`` where it is not finished."""
        name = f"step-{index:05d}.npz"
        arrays = self._read(name)
        if arrays is None:
            return None
        if "loss" not in arrays:  # of an earlier version
            (self._folder / name).unlink(missing_ok=True)
            return None
        return Step(loss=float(arrays.pop("loss")), **arrays)

    def write(self, index: int, step: Step) -> None:
        """Keeps a finished step; one that another process has kept in the meantime stays."""
        self._write(f"step-{index:05d}.npz", vars(step))

    def finished(self, count: int) -> list[int]:
        """Positions of the finished steps among the first ``count``."""
        return [index for index in range(count) if self.holds(index)]

    def read_calibration(self) -> Calibrated | None:
        """What calibration found, ``None`` where it was not finished."""
        arrays = self._read("calibrated.npz")
        if arrays is None:
            return None
        parts: dict[str, Arrays] = {part: {} for part in _PARTS}
        for name, values in arrays.items():
            part, slash, own = name.partition("/")
            parts[part + slash][own] = values
        return Calibrated(*parts.values())

    def write_calibration(self, calibrated: Calibrated) -> None:
        """Keeps what calibration found; what another process has kept in the meantime stays."""
        kinds: tuple[Mapping[str, npt.ArrayLike], ...] = (calibrated.ranges, calibrated.routed, calibrated.images)
        parts = zip(_PARTS, kinds, strict=True)
        self._write("calibrated.npz", {f"{part}{name}": value for part, own in parts for name, value in own.items()})

    def _read(self, name: str) -> Arrays | None:
        path = self._folder / name
        try:
            with np.load(path, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # the machine went down before it was on the disk
            path.unlink(missing_ok=True)
            return None

    def _write(self, name: str, arrays: Mapping[str, Any]) -> None:
        # The first stays: of two processes with the same parameters, both go on with the same numbers.
        with writable(self._folder), suppress(FileExistsError), atomic(self._folder / name, replace=False) as file:
            np.savez(file, **arrays)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Tells in one line that a search checkpoint cannot be written.

    Raises:
        UserError: That line.
    """
    try:
        yield
    except Exception as error:
        if (reason := why_unwritable(error)) is None:
            raise
        raise UserError(
            f"cannot write the search checkpoint in {folder} ({reason}); free space or set autoquant.checkpoint to "
            "another folder"
        ) from None
