"""What replacing a few linears does to the predictions, in whole forwards: for linears outside the decoder blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layerbits.inputs.calibration import Batch
from layerbits.progress import part_done
from layerbits.scoring.divergence import Reference
from layerbits.scoring.patches import forwards
from layerbits.scoring.steps import LOGITS_AT_ONCE, predictions
from layerbits.scoring.suffix import Perturbation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WholeForwards:
    """Measures perturbations on one batch as :class:`~layerbits.scoring.suffix.SuffixRunner`, without its shortcut.

    A vision tower runs before every decoder block, so nothing behind it can be taken from another run.

    Args:
        model: A causal language model; between calls it is as it was.
        batch: The rows.
        background: Linears that are replaced in every perturbation, unless it says otherwise.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch, background: Perturbation | None = None) -> None:
        self._model = model
        self._batch = batch
        self._background = dict(background or {})
        with torch.inference_mode():
            self._references = [Reference(lambda logits: logits, *predictions(model, s)) for s in batch.segments]

    def measure(self, perturbations: Sequence[Perturbation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Measures each perturbation alone.

        Args:
            perturbations: ``P`` of them.

        Returns:
            Per loss token: float32 ``[P, n]`` KL divergence of the perturbed from the unquantized prediction, nats, and
            float32 ``[P, n]`` change of the loss.
        """
        parts: list[list[torch.Tensor]] = []
        runs = len(perturbations) * len(self._references)
        with torch.inference_mode():
            for segment, reference in zip(self._batch.segments, self._references, strict=True):
                found: list[tuple[torch.Tensor, torch.Tensor]] = []
                for perturbation in perturbations:
                    replaced = {**self._background, **perturbation}
                    with forwards({self._model.get_submodule(n): f for n, f in replaced.items()}):
                        logits, _ = predictions(self._model, segment)
                    size = max(1, LOGITS_AT_ONCE // reference.vocabulary)
                    spans = [slice(at, at + size) for at in range(0, len(logits), size)]
                    pieces = [reference.compare(span, logits[None, span]) for span in spans]
                    kl, change = (torch.cat(piece, dim=1) for piece in zip(*pieces, strict=True))
                    found.append((kl, change))
                    part_done((len(parts) * len(perturbations) + len(found)) / runs)
                parts.append([torch.cat(values) for values in zip(*found, strict=True)])
        kl, change = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
        return kl, change
