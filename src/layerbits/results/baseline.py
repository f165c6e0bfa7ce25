"""How well the unquantized model predicts the scored rows: what no score is worth more than."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerbits.errors import UserError

DOUBTFUL = 0.5
"""Share of ln(vocabulary) from which on the loss is a warning; ``docs/models.md`` has the reason."""

EARLY = 100
"""Loss tokens of a first batch that are enough to stop a run on: a trained model never is that far off on so many."""

_REASONS = (
    "the tokenizer is another model's, rows lack a beginning-of-text token, or the checkpoint is damaged or quantized"
)


@dataclass(frozen=True)
class BaselineLoss:
    """The unquantized model on the rows that were scored.

    Attributes:
        loss_per_token: Mean loss of the tokens that came true, nats.
        vocabulary: Tokens that the model chooses among; guessing loses their logarithm.
    """

    loss_per_token: float
    vocabulary: int

    @property
    def guessing(self) -> float:
        """Loss per token of a model that knows nothing, nats: ln(vocabulary)."""
        return math.log(self.vocabulary)

    def check(self, hint: str = "") -> tuple[str, ...]:
        """Judges whether what was loaded can be the model that was named.

        Args:
            hint: What more is known of the rows, for the message.

        Returns:
            A warning where it is doubtful.

        Raises:
            UserError: It predicts no better than guessing, or nothing at all.
        """
        loss = f"the unquantized model loses {self.loss_per_token:.2f} nats per token on the captions"
        bound = f"ln({self.vocabulary:,}) = {self.guessing:.2f} that guessing loses"
        more = f" ({hint})" if hint else ""
        if not self.loss_per_token < self.guessing:
            raise UserError(
                f"{loss}, no less than the {bound}, so its scores would mean nothing: {_REASONS}{more}; check "
                "both, or set model.random_weights=true to measure time and memory alone"
            )
        if self.loss_per_token >= DOUBTFUL * self.guessing:
            return (
                f"{loss}, more than half of the {bound}: perhaps {_REASONS}{more}; check before you trust the scores",
            )
        return ()


def check_first_batch(loss: float, tokens: int, vocabulary: int, hint: str = "") -> None:
    """Stops a run after its first batch where that is enough to know.

    Args:
        loss: Mean loss of the batch's tokens, nats.
        tokens: How many those are.
        vocabulary: As in :class:`BaselineLoss`.
        hint: As :meth:`BaselineLoss.check` takes it.

    Raises:
        UserError: As :meth:`BaselineLoss.check`.
    """
    if tokens >= EARLY:
        BaselineLoss(loss, vocabulary).check(hint)
