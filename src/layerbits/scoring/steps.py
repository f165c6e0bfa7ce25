"""One step of a model on one batch: calibration forward, loss and its backward, logits of the loss positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from layerbits.inputs.calibration import Batch, Segment
from layerbits.scoring.features import picture_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 27
"""Logits in one piece of a chunked loss: 512 MB in float32."""

_NO_CACHE = {"use_cache": False}
"""Given with each call, because the configuration of a text model within another has a value of its own."""


def calibration_forward(model: PreTrainedModel, batch: Batch, need_logits: bool) -> None:
    """Runs every token of a batch through the model for its activation ranges.

    Args:
        model: The model.
        batch: Its segments run one by one, so that packed rows never meet a padded token.
        need_logits: Whether the output head is scored and must see every token too.
    """
    extra: dict[str, int] = {}
    if not need_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1
    for segment in batch.segments:
        model(**_inputs(model, segment), **_NO_CACHE, **extra)


Labels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Float32 logits ``[n, vocabulary]`` and the tokens that came true ``[n]`` → the tokens that the loss is taken for."""


def loss_backward(
    model: PreTrainedModel,
    batch: Batch,
    after_segment: Callable[[], None] = lambda: None,
    chunked: bool = False,
    labels: Labels = lambda _logits, targets: targets,
) -> torch.Tensor | float:
    """Backpropagates the mean token loss of a batch, segment by segment.

    Args:
        model: A causal language model.
        batch: Its segments share one mean, so that cutting a batch into segments changes no gradient.
        after_segment: Called after each segment's backward.
        chunked: Whether to make the logits in pieces, which saves their memory (see :func:`has_plain_head`).
        labels: The tokens that the loss is taken for; those that came true by default.

    Returns:
        Tensor ``[]``, the loss of the tokens that came true, nats, summed; 0.0 of an empty batch.
    """
    came_true: torch.Tensor | float = 0.0
    for segment in batch.segments:
        if chunked:
            came_true = came_true + _chunked_backward(model, segment, batch.loss_tokens, labels)
        else:
            logits, targets = predictions(model, segment)
            logits = logits.float()
            wanted = labels(logits.detach(), targets)
            total = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            came_true = came_true + _loss(total, logits, wanted, targets)
            del logits  # a quarter of what the loss would take at its peak
            (total / batch.loss_tokens).backward()
        after_segment()
    return came_true


def _loss(total: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed loss of the tokens that came true, where ``total`` is that of the wanted ones."""
    if wanted is targets:
        return total.detach()
    return torch.nn.functional.cross_entropy(logits.detach(), targets, reduction="sum")


def first_tokens(batch: Batch) -> Batch:
    """The first eight tokens of a batch: enough to see what a model does."""
    segment = batch.segments[0]
    return Batch((Segment(segment.input_ids[:1, :8], None, segment.loss_mask[:1, :8], segment.sample[:1, :8]),))


def has_plain_head(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the logits are nothing but the output head on the last hidden state (no scaling, no soft cap)."""
    (probe,) = first_tokens(batch).segments
    with torch.no_grad():
        whole = model(**_inputs(model, probe), **_NO_CACHE).logits
        hidden = model.base_model(**_inputs(model, probe), **_NO_CACHE).last_hidden_state
        if hidden.device != whole.device:
            return False  # spread over several GPUs: leave it to the model
        return bool(torch.equal(model.get_output_embeddings()(hidden), whole))


def _chunked_backward(
    model: PreTrainedModel, segment: Segment, loss_tokens: int, labels: Labels
) -> torch.Tensor | float:
    kept, targets = last_hidden_states(model, segment)
    head = model.get_output_embeddings()
    gradient = torch.empty_like(kept)
    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    came_true: torch.Tensor | float = 0.0
    for start in range(0, len(kept), size):
        piece = kept[start : start + size].detach().requires_grad_()
        logits = head(piece).float()
        true = targets[start : start + size]
        wanted = labels(logits.detach(), true)
        total = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        came_true = came_true + _loss(total, logits, wanted, true)
        del logits
        (gradient[start : start + size],) = torch.autograd.grad(total / loss_tokens, piece)
    kept.backward(gradient)
    return came_true


def loss_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits at the positions that the loss counts.

    Returns:
        Tensor ``[loss tokens of the batch, vocabulary]`` in the model's dtype.
    """
    return torch.cat([predictions(model, segment)[0] for segment in batch.segments])


def summed_loss(logits: torch.Tensor, batch: Batch) -> float:
    """Loss of the tokens that came true, nats, summed over the :func:`loss_logits` of a batch."""
    targets = torch.cat([s.input_ids[:, 1:][s.loss_mask[:, 1:]] for s in batch.segments])
    return float(torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum"))


def predictions(model: PreTrainedModel, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target tokens of a segment's loss positions.

    Returns:
        ``[n, vocabulary]`` logits and ``[n]`` targets.
    """
    inputs = _inputs(model, segment)
    return _loss_positions(model(**inputs, **_NO_CACHE).logits, inputs["input_ids"], segment)


def last_hidden_states(model: PreTrainedModel, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and target tokens of a segment's loss positions.

    Returns:
        ``[n, features]`` hidden states and ``[n]`` targets.
    """
    inputs = _inputs(model, segment)
    hidden = model.base_model(**inputs, **_NO_CACHE).last_hidden_state
    return _loss_positions(hidden, inputs["input_ids"], segment)


def _loss_positions(
    values: torch.Tensor, input_ids: torch.Tensor, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, ...]`` values at the positions that predict a counted token, and those tokens."""
    wanted = segment.loss_mask[:, 1:]
    targets = input_ids[:, 1:].to(values.device)
    if bool(wanted.all()):
        return values[:, :-1].flatten(0, 1), targets.flatten()
    mask = wanted.to(values.device)
    return values[:, :-1][mask], targets[mask]


def _inputs(model: PreTrainedModel, segment: Segment) -> dict[str, torch.Tensor]:
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": segment.input_ids.to(device)}
    if segment.attention_mask is not None:
        inputs["attention_mask"] = segment.attention_mask.to(device)
    return {**inputs, **picture_inputs(model, segment)}
