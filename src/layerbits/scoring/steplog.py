"""Finished steps of a pass on disk: a killed pass goes on from its last one, several processes share the work."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerbits.atomic import write_json
from layerbits.errors import UserError
from layerbits.results.result import FloatArray


@dataclass(frozen=True)
class Step:
    """What one batch contributes.

    Attributes:
        raw: ``[G, C]`` raw scores of the batch.
        samples: ``[s]`` samples that it holds. sample_raw: ``[s, G, C]`` their shares. sample_tokens: ``[s]``.
        bad: ``[n, 3]`` linear, candidate and sample of scores that are not finite.
        routed: Tokens per expert, the expert modules one after the other.
    """

    raw: FloatArray
    samples: npt.NDArray[np.int64]
    sample_raw: FloatArray
    sample_tokens: npt.NDArray[np.int64]
    bad: npt.NDArray[np.int64]
    routed: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        ranges: Static input ranges by name.
        routed: Tokens per expert, by expert module.
    """

    ranges: dict[str, Any]
    routed: dict[str, Any]


_RANGES, _ROUTED = "ranges/", "routed/"


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
        if owner.exists():
            if json.loads(owner.read_text()) != fingerprint:
                raise UserError(
                    f"the search checkpoint in {folder} was made with other parameters; "
                    "give another folder as autoquant.checkpoint or delete it"
                )
        else:
            write_json(owner, fingerprint)

    def holds(self, index: int) -> bool:
        """Whether a step is finished."""
        return self._path(f"step-{index:05d}.npz").exists()

    def read(self, index: int) -> Step | None:
        """A finished step, ``None`` where it is not finished."""
        path = self._path(f"step-{index:05d}.npz")
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as data:
            return Step(**{name: data[name] for name in data.files})

    def write(self, index: int, step: Step) -> None:
        """Keeps a finished step."""
        self._write(f"step-{index:05d}.npz", vars(step))

    def finished(self, count: int) -> list[int]:
        """Positions of the finished steps among the first ``count``."""
        return [index for index in range(count) if self.holds(index)]

    def read_calibration(self) -> Calibrated | None:
        """What calibration found, ``None`` where it was not finished."""
        path = self._path("calibrated.npz")
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as data:
            parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for name in data.files:
                parts[name.startswith(_ROUTED)][name.partition("/")[2]] = data[name]
        return Calibrated(*parts)

    def write_calibration(self, found: Calibrated) -> None:
        """Keeps what calibration found."""
        arrays = {f"{_RANGES}{name}": value for name, value in found.ranges.items()}
        self._write("calibrated.npz", arrays | {f"{_ROUTED}{name}": value for name, value in found.routed.items()})

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _write(self, name: str, arrays: dict[str, Any]) -> None:
        partial = self._path(f".{name}.{socket.gethostname()}.{os.getpid()}.npz")
        try:
            np.savez(partial, **arrays)
            partial.replace(self._path(name))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write the search checkpoint in {self._folder} ({error.strerror}); free space or set "
                "autoquant.checkpoint to another folder"
            ) from None
