"""The model and the rows that a scheme was scored on, found again from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.schemes.scheme import Scheme
from layerbits.scoring.settings import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerbits.inputs.calibration import Batch
    from layerbits.inputs.captions import CaptionSet
    from layerbits.inputs.models import LoadedModel, ResolvedModel
    from layerbits.inputs.picture_rows import Reader


@dataclass(frozen=True)
class Prepared:
    """Everything of a scheme's source but the weights.

    Attributes:
        captions: With those held out from calibration.
        calibration: Batches for the activation ranges, as when scoring.
        reader: How pictures become tokens; ``None`` where there are none.
    """

    scheme: Scheme
    resolved: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    captions: CaptionSet
    calibration: tuple[Batch, ...]
    reader: Reader | None = None

    def load(self, device: str = "auto", whole: bool = False) -> LoadedModel:
        """Loads the weights.

        Args:
            device: ``auto``, ``cpu`` or ``cuda``.
            whole: Keeps them all on the device, whatever the memory mode of the scheme's scores.

        Raises:
            UserError: They cannot be read, or there is no such device.
        """
        import torch

        from layerbits.inputs.loading import empty_model, load
        from layerbits.inputs.models import scored_linears
        from layerbits.scoring.placement import in_host_memory

        if check_device(device) == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but PyTorch sees no GPU here; use device=cpu or a machine with one")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        streamed = not whole and in_host_memory(
            self.resolved,
            list(self.scheme.modules) or list(scored_linears(empty_model(self.resolved), self.resolved.spec)),
            tokens=max(s.input_ids.numel() for b in self.calibration for s in b.segments),
            device=device,
            wanted=self.scheme.settings.get("autoquant", {}).get("memory", "auto"),
        )
        return load(self.resolved, self.tokenizer, device, int(self.scheme.settings.get("seed", 0)), streamed)


def prepare_together(schemes: Sequence[Scheme], purpose: str) -> Prepared:
    """Finds what some schemes share, as :func:`prepare` does for the first.

    Args:
        schemes: One or more.
        purpose: What they are for, a verb, for the errors.

    Raises:
        UserError: There is none, or they are of several models or calibrations; or as :func:`prepare`.
    """
    if not schemes:
        raise UserError(f"there is no scheme to {purpose}; name at least one")
    first = schemes[0]
    for scheme in schemes[1:]:
        scheme.check_revision(first.model.revision)
        if scheme.calibration != first.calibration:
            raise UserError(f"{first.name} and {scheme.name} were calibrated differently; {purpose} them apart")
    return prepare(first)


def prepare(scheme: Scheme) -> Prepared:
    """Finds a scheme's model and calibration rows, and checks that they are the ones that were scored.

    Raises:
        UserError: The record does not say how to load them, or they have changed since.
    """
    from layerbits.inputs.datasets import load_dataset
    from layerbits.inputs.model_spec import ModelSpec
    from layerbits.inputs.models import load_tokenizer, resolve
    from layerbits.inputs.processor import reader_for
    from layerbits.inputs.rows import rows_of

    if missing := [key for key in ("model", "dataset") if key not in scheme.settings]:
        raise UserError(
            f"the scores behind {scheme.name} do not say how to load the {' and the '.join(missing)}; "
            "score the model with experiments/sensitivity.py"
        )
    resolved = resolve(ModelSpec.from_mapping(scheme.settings["model"]))
    scheme.check_revision(resolved.revision)
    data = scheme.calibration
    dataset = scheme.settings["dataset"]
    captions = load_dataset(data.dataset, data.size, dataset.get("path"), dataset.get("share"))
    if captions.digest != data.digest:
        raise UserError(
            f"the captions of {data.dataset} {data.size} have changed since they were scored "
            f"({captions.digest} instead of {data.digest}); restore the file, or score again"
        )
    tokenizer = load_tokenizer(resolved)
    reader = reader_for(captions, resolved, tokenizer, dataset.get("min_pixels"), dataset.get("max_pixels"))
    rows = rows_of(captions.captions, tokenizer, reader, *data.row_shape)
    return Prepared(scheme, resolved, tokenizer, captions, rows, reader)
