"""Rows of whatever a run calibrates on: captions, pictures with words, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError
from layerbits.inputs.calibration import (
    Batch,
    Calibration,
    build_calibration,
    build_rows,
    few_tokens_warning,
)
from layerbits.inputs.datasets import has_pictures
from layerbits.inputs.picture_rows import Reader, picture_batches
from layerbits.inputs.pictures import Pictured
from layerbits.inputs.row_shape import check_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NO_TEMPLATE = (
    "the model has no chat template: a row is its pictures and then the words of the answers; where the model was made "
    "for chats, put the template of its processor into the checkpoint"
)


def calibration_of(
    captions: Sequence[Pictured | str],
    tokenizer: PreTrainedTokenizerBase,
    reader: Reader | None,
    packing: str,
    seq_len: int,
    batch_size: int,
    num_score_samples: int | None,
) -> Calibration:
    """As :func:`layerbits.inputs.calibration.build_calibration`, for captions and pictures.

    Args:
        captions: What to calibrate on.
        tokenizer: The model's.
        reader: How pictures become tokens; ``None`` where there are none.
        packing: Of captions.
        seq_len: Tokens of a row of captions, at most; a row with pictures is never cut.
        batch_size: Rows a batch.
        num_score_samples: How many of them to score on; ``None`` = all.

    Raises:
        UserError: As there, or a picture cannot be used.
    """
    if reader is None or not has_pictures(captions):
        texts = [caption for caption in captions if isinstance(caption, str)]
        return build_calibration(texts, tokenizer, packing, seq_len, batch_size, num_score_samples)
    check_rows(packing, seq_len, batch_size)
    samples = len(captions) if num_score_samples is None else num_score_samples
    if not 1 <= samples <= len(captions):
        raise UserError(
            f"autoquant.num_score_samples={num_score_samples} must be between 1 and the {len(captions)} of the "
            "dataset; choose another or a larger dataset.size"
        )
    calib = rows_of(captions, tokenizer, reader, packing, seq_len, batch_size)
    score = calib
    if samples < len(captions):
        score = rows_of(captions[:samples], tokenizer, reader, packing, seq_len, batch_size)
    warnings = few_tokens_warning(score, samples == len(captions))
    return Calibration(calib, score, samples, (*warnings, *([] if reader.template else [_NO_TEMPLATE])))


def rows_of(
    captions: Sequence[Pictured | str],
    tokenizer: PreTrainedTokenizerBase,
    reader: Reader | None,
    packing: str,
    seq_len: int,
    batch_size: int,
) -> tuple[Batch, ...]:
    """Batches of captions and of pictures, taking turns; arguments as of :func:`calibration_of`.

    Without a reader, pictures are passed over; samples keep their positions in the whole list.

    Raises:
        UserError: As :func:`calibration_of`.
    """
    shown = [(i, caption) for i, caption in enumerate(captions) if isinstance(caption, Pictured)]
    texts = [(i, caption) for i, caption in enumerate(captions) if isinstance(caption, str)]
    batches: list[list[Batch]] = []
    if shown and reader is not None:
        batches.append(list(picture_batches([row for _, row in shown], reader, batch_size, [i for i, _ in shown])))
    if texts:
        made = build_rows([text for _, text in texts], tokenizer, packing, seq_len, batch_size)
        batches.append([_renumbered(batch, [i for i, _ in texts]) for batch in made])
    places = [((n + 0.5) / len(part), which, n) for which, part in enumerate(batches) for n in range(len(part))]
    return tuple(batches[which][n] for _, which, n in sorted(places))


def _renumbered(batch: Batch, numbers: Sequence[int]) -> Batch:
    """A batch whose samples have their positions in the whole list."""
    known = torch.tensor([*numbers, -1], dtype=torch.int32)  # the last is that of padding
    return Batch(tuple(replace(s, sample=known[s.sample.long()]) for s in batch.segments))
