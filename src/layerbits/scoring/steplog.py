"""Finished steps of a pass on disk: a killed pass goes on from its last one, several processes share the work."""

from __future__ import annotations

import json
import os
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
        loss: Loss of the unquantized model on the batch, nats, summed over its loss tokens.
        routed: Tokens per expert, the expert modules one after the other.
    """

    raw: FloatArray
    samples: npt.NDArray[np.int64]
    sample_raw: FloatArray
    sample_tokens: npt.NDArray[np.int64]
    bad: npt.NDArray[np.int64]
    loss: float
    routed: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


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

    def read(self, index: int) -> Step | None:
        """A finished step, ``None`` where it is not finished."""
        path = self._path(f"step-{index:05d}.npz")
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as data:
            if "loss" not in data.files:  # of an earlier version
                return None
            return Step(**{name: data[name] for name in data.files if name != "loss"}, loss=float(data["loss"]))

    def write(self, index: int, step: Step) -> None:
        """Keeps a finished step."""
        self._write(f"step-{index:05d}.npz", vars(step))

    def read_routed(self, part: int) -> dict[str, Any]:
        """Tokens per expert that a process counted in calibration, by expert module; empty where it counted none."""
        path = self._path(f"routed-{part}.npz")
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}

    def write_routed(self, routed: dict[str, Any], part: int) -> None:
        """Keeps what a process counted in calibration; with nothing to keep there is no file."""
        if routed:
            self._write(f"routed-{part}.npz", routed)

    def read_ranges(self, part: int = 0) -> dict[str, Any] | None:
        """Calibrated ranges (arrays by name), ``None`` where calibration was not finished."""
        path = self._path(f"ranges-{part}.npz")
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}

    def write_ranges(self, ranges: dict[str, Any], part: int = 0) -> None:
        """Keeps calibrated ranges."""
        self._write(f"ranges-{part}.npz", ranges)

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _write(self, name: str, arrays: dict[str, Any]) -> None:
        partial = self._path(f".{name}.{os.getpid()}.npz")
        try:
            np.savez(partial, **arrays)
            partial.replace(self._path(name))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write the search checkpoint in {self._folder} ({error.strerror}); free space or set "
                "autoquant.checkpoint to another folder"
            ) from None
