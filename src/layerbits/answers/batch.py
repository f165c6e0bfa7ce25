"""How many requests a forward takes, by the memory that is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.answers.harness import TOGETHER, Lengths
from layerbits.errors import UserError
from layerbits.inputs.models import language_model_linears, output_head
from layerbits.scoring.memory import LOGIT
from layerbits.scoring.precision import Precision, plan_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST = 16
"""Requests a forward where there is room for them. No more where there is more: another batch size can move the last
bits of an answer, and so all machines with room give the same."""


def plan_batch(model: PreTrainedModel, lengths: Lengths, wanted: int | None, dtype: str) -> tuple[int, Precision]:
    """Chooses how many requests go through the model at once, and what it computes in.

    Args:
        model: The loaded model.
        lengths: Tokens of the longest requests.
        wanted: Requests a forward; ``None``: :data:`MOST`, or half of it as often as it must be.
        dtype: One of :data:`layerbits.scoring.settings.DTYPES`.

    Returns:
        Requests a forward, and how the model is measured.

    Raises:
        UserError: float32 does not fit, of ``None`` not even with one request.
    """

    def planned(size: int, remedy: str) -> Precision:
        return plan_work(model, lambda itemsize: _work(model, lengths, size, itemsize), dtype, remedy)

    def fits(size: int) -> bool:
        try:
            return planned(size, "").fits
        except UserError:
            return False

    if wanted is not None:
        return wanted, planned(wanted, "use fewer requests at once (eval_batch_size=auto), or dtype=model")
    size = MOST
    while size > 1 and not fits(size):
        size //= 2
    return size, planned(size, "one request at a time is too much; use dtype=model, or tasks with shorter documents")


def _work(model: PreTrainedModel, lengths: Lengths, size: int, itemsize: int) -> float:
    """Bytes of keys, values and activations, and of the logits of a forward of ``size`` requests.

    A choice among answers takes the logits of all its tokens, twice in float32 beside those of the forward before; a
    written answer those of its next token.
    """
    width = model.get_input_embeddings().weight.shape[1]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    blocks = max(1, getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    head = output_head(model)
    linears = [shapes for name, shapes in language_model_linears(model).items() if name != head]
    widest = max((sum(shape) for shapes in linears for shape in shapes), default=0)
    token = float((2 * blocks * width + 4 * widest) * itemsize)
    chosen = size * lengths.chosen * (token + vocabulary * LOGIT)
    written = TOGETHER * size * (lengths.written * token + vocabulary * LOGIT)
    return max(chosen, written if lengths.written else 0.0)
