"""The held-out rows that a scheme is probed on, as a server takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerbits.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerbits.inputs.calibration import Batch

_ROWS = 8
"""Rows of a batch, at most: more of them are no faster."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Rows of token ids, and which of their positions count; ``n`` positions in all.

    Attributes:
        batches: As the model takes them.
        rows: As a server takes them, without padding.
        wanted: Per row ``[length - 1]``: whether the prediction of a token, but the first, counts.
        caption: ``[n]`` number of the caption of each position that counts.
    """

    batches: tuple[Batch, ...]
    rows: tuple[tuple[int, ...], ...]
    wanted: tuple[NDArray[np.bool_], ...]
    caption: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Positions that count."""
        return len(self.caption)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


def held_out_texts(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, packing: str, seq_len: int, tokens: int
) -> Texts:
    """The first held-out rows that have enough tokens; the same ones that ``probe`` takes.

    Args:
        captions: Held-out captions.
        tokenizer: The model's.
        packing: As the scheme's calibration.
        seq_len: Tokens a row.
        tokens: Positions to compare at least.

    Raises:
        UserError: There are fewer, or none at all.
    """
    from layerbits.inputs.calibration import build_rows
    from layerbits.inputs.captions import NONE_HELD_OUT

    if not captions:
        raise UserError(NONE_HELD_OUT)
    chosen: list[Batch] = []
    count = 0
    together = min(_ROWS, -(-tokens // max(1, seq_len - 1)))
    for batch in build_rows(captions, tokenizer, packing, seq_len, together):
        if count >= tokens:
            break
        chosen.append(batch)
        count += batch.loss_tokens
    if count < tokens:
        raise UserError(f"the held-out captions have {count} tokens, not {tokens}; set tokens={count} or fewer")
    rows, wanted, owners = [], [], []
    for segment in (s for batch in chosen for s in batch.segments):
        for i, ids in enumerate(segment.input_ids):
            real = len(ids) if segment.attention_mask is None else int(segment.attention_mask[i].sum())
            rows.append(tuple(ids[:real].tolist()))
            wanted.append(segment.loss_mask[i, 1:real].numpy())
            owners.append(segment.sample[i, 1:real].numpy()[wanted[-1]])
    _, caption = np.unique(np.concatenate(owners), return_inverse=True)
    return Texts(tuple(chosen), tuple(rows), tuple(wanted), caption)
