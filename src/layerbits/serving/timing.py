"""Times of checkpoints in vLLM, each beside the unquantized model that it was made from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.checkpoint.reader import open_checkpoint
from layerbits.errors import UserError
from layerbits.export.plan import source_folder
from layerbits.serving.gpu import check_card
from layerbits.serving.runtime import kernels, with_kernels
from layerbits.serving.server import Launch, Refused
from layerbits.serving.speed import Speed, Speeds, log_of, measure_speed

if TYPE_CHECKING:
    from layerbits.inputs.models import ResolvedModel
    from layerbits.schemes import Scheme
    from layerbits.serving.check import ServeCheck
    from layerbits.serving.settings import SpeedRequest


@dataclass
class Timer:
    """Times checkpoints one after the other; the unquantized model of several is timed once.

    Args:
        asked: What to time.
    """

    asked: SpeedRequest
    _unquantized: dict[Path, Speed | UserError] = field(default_factory=dict)

    def timed(self, done: ServeCheck, launch: Launch, out: Path) -> ServeCheck:
        """A check with the times of its checkpoint.

        Raises:
            Refused: vLLM does not load it.
            UserError: It was not done in time.
        """
        name = done.folder.name
        speed = measure_speed(launch, done.folder, name, self.asked, out)
        runtime = with_kernels(done.runtime, kernels(log_of(name, out)))
        return replace(done, speeds=Speeds(speed, alone="stopped before that"), runtime=runtime)

    def beside(self, done: ServeCheck, launch: Launch, find: Callable[[], ResolvedModel], out: Path) -> ServeCheck:
        """A check with the times of the unquantized model, too; where it cannot be timed, with the reason.

        Args:
            done: With the times of the checkpoint.
            launch: As the checkpoint was timed.
            find: Finds the unquantized model.
            out: Folder for vLLM's log.
        """
        assert done.speeds is not None
        try:
            plain = self._plain(_folder(find()), launch, out)
        except UserError as why:
            speeds = replace(done.speeds, alone=str(why))
            print(f"warning: {speeds.missing}", file=sys.stderr, flush=True)
            return replace(done, speeds=speeds)
        return replace(done, speeds=Speeds(done.speeds.quantized, plain))

    def _plain(self, folder: Path, launch: Launch, out: Path) -> Speed:
        """Times an unquantized model.

        Raises:
            UserError: It cannot be timed, or could not before.
        """
        if folder not in self._unquantized:
            self._unquantized[folder] = self._speed_or_reason(folder, launch, out)
        known = self._unquantized[folder]
        if isinstance(known, UserError):
            raise known
        return known

    def _speed_or_reason(self, folder: Path, launch: Launch, out: Path) -> Speed | UserError:
        try:
            check_card(open_checkpoint(folder), launch.environment, launch.arguments)
            return measure_speed(launch, folder, "the unquantized model", self.asked, out)
        except Refused as words:
            return UserError(f"vLLM refused {folder}: {words}; its log is in {out}")
        except UserError as error:
            return error


def local_source(scheme: Scheme) -> ResolvedModel:
    """Finds the model that a scheme was made of, without its captions.

    Raises:
        UserError: The scheme does not say where it is, or it is not there, or has changed since.
    """
    from layerbits.inputs.model_spec import ModelSpec
    from layerbits.inputs.models import resolve

    if "model" not in scheme.settings:
        raise UserError(f"the scores behind {scheme.name} do not say where it is")
    resolved = resolve(ModelSpec.from_mapping(scheme.settings["model"]))
    scheme.check_revision(resolved.revision)
    return resolved


def _folder(resolved: ResolvedModel) -> Path:
    """The folder of an unquantized model on this machine; nothing is downloaded.

    Raises:
        UserError: It is not here, or is quantized itself.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    if resolved.quantization is not None:
        raise UserError(f"what was scored is quantized itself ({resolved.quantization.words})")
    try:
        return source_folder(resolved, download=False)
    except LocalEntryNotFoundError:
        raise UserError(
            f"{resolved.source} is not on this machine; `hf download {resolved.source}` fetches it"
        ) from None
