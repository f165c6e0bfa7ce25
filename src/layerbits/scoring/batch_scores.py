"""The scores of one batch, as the gradients of its segments arrive."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Batch
from layerbits.inputs.files import few
from layerbits.scoring.tap import Tap


@dataclass(frozen=True)
class BatchScores:
    """What a batch contributes.

    Attributes:
        by_token: Scores, float32 ``[M, C, T]``.
        owner: Sample of each token, ``[T]``, -1 at padding.
        loss: Loss of the unquantized model on the tokens that came true, nats, summed.
    """

    by_token: torch.Tensor
    owner: torch.Tensor
    loss: float


class Recorder:
    """Takes gradients segment by segment and adds up what they are worth.

    Args:
        taps: The scored modules, ``M``.
        candidates: How many there are, ``C``.
        batch: The rows, ``T`` tokens.
        tower: Names of modules of a vision tower, whose patches all stand at the first image token of their row.
        signed: Whether sums over output features stay signed and unsquared.

    Attributes:
        by_token: As in :class:`BatchScores`.
    """

    def __init__(self, taps: Sequence[Tap], candidates: int, batch: Batch, tower: Set[str], signed: bool) -> None:
        if tower and any(len(segment.pictures) > 1 for segment in batch.segments):
            raise ValueError("rows with pictures must be segments of their own where the vision tower is scored")
        if tower and signed:
            raise Unsupported("method=fisher sums over windows of tokens, which a vision tower has not; use gradient")
        tokens = sum(segment.input_ids.numel() for segment in batch.segments)
        self.by_token = torch.zeros((len(taps), candidates, tokens), device=taps[0].device)
        self._taps = taps
        self._tower = tower
        self._segments = batch.segments
        self._signed = signed
        self._segment = self._start = 0
        self._called: set[int] = set()

    @property
    def tokens(self) -> int:
        """Of the current segment."""
        return self._segments[self._segment].input_ids.numel()

    def add(self, index: int, inputs: Sequence[torch.Tensor], output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Scores one call of a module; several calls in a forward pass are summed.

        Args:
            index: Position of the module.
            inputs: Of the call, from :meth:`Tap.inputs_of`.
            output: Of the call.
            gradient: Of the output.
        """
        self._called.add(index)
        of_tower = self._taps[index].name in self._tower
        with torch.no_grad():
            for candidates, scores in self._taps[index].scores(inputs, output, gradient, self._signed):
                if of_tower:
                    place = self._start + int(self._segments[self._segment].image_tokens.flatten().nonzero()[0])
                    for candidate, total in zip(candidates, scores.sum(dim=1), strict=True):
                        self.by_token[index, candidate, place] += total.to(self.by_token.device)
                    continue
                span = slice(self._start, self._start + scores.shape[1])
                for candidate, row in zip(candidates, scores, strict=True):  # a list as an index would be copied over
                    self.by_token[index, candidate, span] += row.to(self.by_token.device)

    def next_segment(self) -> None:
        """Goes on to the tokens of the next segment.

        Raises:
            UserError: A module was not called in this one.
        """
        missing = [tap.name for index, tap in enumerate(self._taps) if index not in self._called]
        if self._segments[self._segment].pictures and self._tower and self._tower <= set(missing):
            raise UserError("no gradient reaches the vision tower of this model; use model.vision=false")
        # LLaVA, say, takes the last block but one of its tower: no gradient comes to the last, which scores 0
        check_called([name for name in missing if name not in self._tower])
        self._called.clear()
        self._start += self.tokens
        self._segment += 1


def check_called(missing: Sequence[str]) -> None:
    """Refuses modules that a text never reaches: adapters of other blocks that share these weights (Zamba2), say.

    Args:
        missing: Their names.

    Raises:
        UserError: There are any.
    """
    if missing:
        alone = len(missing) == 1
        which = f"{missing[0]} is" if alone else f"{len(missing)} linears ({few(list(missing))}) are"
        raise UserError(
            f"{which} never called in a forward pass; leave {'it' if alone else 'them'} out with "
            f"model.exclude=[{','.join(missing)}]"
        )
