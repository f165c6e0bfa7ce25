"""Captions as token rows: what a model's activation ranges and scores are taken on.

Each caption is tokenised alone, as text: a control token that it spells out is no control token. It ends with a
separator: the tokenizer's end-of-text token, or without one its begin-of-text token or a newline. Every row opens with
what the tokenizer opens a text with, be it one token, several (GLM), or none. What happens then is the *packing*:

- ``packed``: all captions in one stream, cut into rows of ``seq_len`` tokens. A caption may straddle two rows. The rest
  of the stream is a row of its own, shorter length: no token is padded and none is lost, but for a last separator that
  would stand alone in its row and could neither predict nor be predicted.
- ``padded``: one caption a row, cut at ``seq_len`` and padded on the right.

Within a batch, rows of one length form a segment, a rectangle; a packed batch has at most two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError
from layerbits.inputs.captions import Question
from layerbits.inputs.files import few
from layerbits.inputs.row_shape import check_rows, check_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LOSS_TOKENS = 1500
"""Fewer loss tokens than this to rank by earn a warning: a rule of thumb, from one model.

Two disjoint random draws of captions with this many loss tokens each ranked the 120 groups of SmolLM2-135M with a mean
Kendall tau of 0.92 to 0.93 (0.88 or more in 95 of 100 pairs of draws) and shared 9 of the 10 most sensitive groups.
With 200 tokens it was 0.81 to 0.82 and 7 to 8, with 3,900 it was 0.95 and 9.4. (Per-tensor FP8 weights and activations,
and per-channel INT8 weights; FP32 on CPU, the 512 everyday captions in packed rows of 128 tokens.) An interval
measured on the run's own samples says more.
"""

_PADDING = -1


@dataclass(frozen=True, eq=False)
class PictureRow:
    """What a model is given of a row's pictures; two rows are never equal, so that features can be kept by row.

    Attributes:
        inputs: Keyword of the model's forward → tensor, of which rows are joined along the first dimension:
            ``pixel_values`` and whatever else the model's processor makes (grids, sizes, kinds of tokens).
        source: File or name of each picture, for errors.
    """

    inputs: Mapping[str, torch.Tensor]
    source: str = ""


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of one length; all tensors are ``[rows, length]``.

    Attributes:
        input_ids: int64 tokens.
        attention_mask: int64, 0 at padding; ``None`` when there is no padding.
        loss_mask: bool, true where the token at this position is predicted from the one before it and counts in the
            loss. Never true at position 0 or at padding.
        sample: int32, position in the caption list of the caption that a token belongs to. A separator belongs to the
            caption that it ends, what opens a row to the caption after it; -1 at padding.
        pictures: Pictures of each row; empty where it has none.
        image_mask: bool, true at image placeholders; ``None`` without pictures.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    loss_mask: torch.Tensor
    sample: torch.Tensor
    pictures: tuple[PictureRow, ...] = ()
    image_mask: torch.Tensor | None = None

    @property
    def image_tokens(self) -> torch.Tensor:
        """Bool ``[rows, length]``: where image placeholders are."""
        return torch.zeros_like(self.loss_mask) if self.image_mask is None else self.image_mask

    def part(self, span: slice) -> Segment:
        """Some of its rows."""
        return Segment(
            self.input_ids[span],
            None if self.attention_mask is None else self.attention_mask[span],
            self.loss_mask[span],
            self.sample[span],
            self.pictures[span],
            None if self.image_mask is None else self.image_mask[span],
        )

    def tiled(self, tiles: int) -> Segment:
        """Its rows several times over."""
        return Segment(
            self.input_ids.repeat(tiles, 1),
            None if self.attention_mask is None else self.attention_mask.repeat(tiles, 1),
            self.loss_mask.repeat(tiles, 1),
            self.sample.repeat(tiles, 1),
            self.pictures * tiles,
            None if self.image_mask is None else self.image_mask.repeat(tiles, 1),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """One step: the loss is the mean over :attr:`loss_tokens`, across all segments."""

    segments: tuple[Segment, ...]

    @cached_property
    def loss_tokens(self) -> int:
        """Tokens that the loss is the mean of; at least 1."""
        return sum(int(s.loss_mask.sum()) for s in self.segments)

    @property
    def rows(self) -> int:
        """Rows in all segments."""
        return sum(len(s.input_ids) for s in self.segments)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches for the activation ranges and for the scores.

    Attributes:
        calib: Batches of all captions.
        score: Batches of the first ``score_samples`` captions.
        score_samples: Captions that are scored on.
        warnings: What a reader of the scores should know, a line each.
    """

    calib: tuple[Batch, ...]
    score: tuple[Batch, ...]
    score_samples: int
    warnings: tuple[str, ...]

    @property
    def calib_rows(self) -> int:
        """Rows in all calibration batches."""
        return sum(b.rows for b in self.calib)

    @property
    def score_rows(self) -> int:
        """Rows in all score batches."""
        return sum(b.rows for b in self.score)

    @property
    def batch_loss_tokens(self) -> tuple[int, ...]:
        """Loss tokens per score batch (``N_b`` of the predicted KL)."""
        return tuple(b.loss_tokens for b in self.score)

    @property
    def padding_share(self) -> float:
        """Share of padding among the tokens of the score batches."""
        return padding_share(self.score)


def build_calibration(
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    packing: str,
    seq_len: int,
    batch_size: int,
    num_score_samples: int | None,
) -> Calibration:
    """Tokenises captions for calibration and scoring.

    Args:
        captions: Calibration captions.
        tokenizer: A Hugging Face tokenizer; it needs no padding token.
        packing: One of :data:`layerbits.inputs.row_shape.PACKINGS`.
        seq_len: Tokens a row, at most.
        batch_size: Rows a batch; the last batch may have fewer.
        num_score_samples: Captions to score on, from the first on; ``None`` = all.

    Raises:
        UserError: A parameter is out of range, or the captions hold no token to predict.
    """
    check_samples(num_score_samples, len(captions))
    check_rows(packing, seq_len, batch_size)
    samples = len(captions) if num_score_samples is None else num_score_samples
    tokens = _tokenise(captions, tokenizer, seq_len)
    calib = _batches(tokens, packing, seq_len, batch_size)
    score = calib
    if samples < len(captions):
        score = _batches(
            replace(tokens, texts=tokens.texts[:samples], counted=tokens.counted[:samples]),
            packing,
            seq_len,
            batch_size,
        )
    warnings = _spelled_out(captions, tokens, tokenizer)
    cut = sum(len(tokens.lead) + len(text) > seq_len for text in tokens.texts)
    if packing == "padded" and cut:
        warnings.append(
            f"{cut} of {len(captions)} captions are longer than a row and were cut; raise autoquant.seq_len"
        )
    if share := padding_share(calib):
        warnings.append(
            f"{share:.1%} of the calibration tokens are padding: the loss leaves them out, but the activation ranges "
            "see them; dataset.packing=packed has none"
        )
    few = few_tokens_warning(score, samples == len(captions))
    return Calibration(calib, score, samples, (*warnings, *few))


def few_tokens_warning(score: Sequence[Batch], every: bool) -> tuple[str, ...]:
    """That there are few tokens to rank by, where there are.

    Args:
        score: Batches that are scored.
        every: Whether those are all captions.
    """
    loss_tokens = sum(b.loss_tokens for b in score)
    if loss_tokens >= MIN_LOSS_TOKENS:
        return ()
    return (
        f"only {loss_tokens:,} loss tokens to rank by, fewer than {MIN_LOSS_TOKENS:,}: near ranks may be chance; "
        f"raise {'dataset.size' if every else 'autoquant.num_score_samples'}",
    )


def build_rows(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, packing: str, seq_len: int, batch_size: int
) -> tuple[Batch, ...]:
    """Tokenises captions and cuts them into batches; the arguments are those of :func:`build_calibration`.

    With ``padded``, what a caption has beyond ``seq_len`` tokens is left out.

    Raises:
        UserError: A parameter is out of range, or the captions hold no token to predict.
    """
    check_rows(packing, seq_len, batch_size)
    return _batches(_tokenise(captions, tokenizer, seq_len), packing, seq_len, batch_size)


def padding_share(batches: Sequence[Batch]) -> float:
    """Share of padding among all tokens of some batches."""
    segments = [s for b in batches for s in b.segments]
    tokens = sum(s.input_ids.numel() for s in segments)
    padding = sum(int((s.attention_mask == 0).sum()) for s in segments if s.attention_mask is not None)
    return padding / tokens


@dataclass(frozen=True)
class _Tokens:
    """Tokens that open a row, tokens of each caption with its separator, and the token to pad with.

    Attributes:
        counted: Of each caption, the tokens that count in the loss: all, or those of the answer to a question.
    """

    lead: list[int]
    texts: list[list[int]]
    counted: list[list[bool]]
    pad: int


def _tokenise(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> _Tokens:
    if not captions:
        raise UserError("there are no captions to tokenise; give a longer caption list")
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if eos is not None or bos is not None:
        separator = [bos if eos is None else eos]
    else:
        separator = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not separator:
        raise UserError("the tokenizer has no end-of-text, begin-of-text or newline token; set its eos_token")
    lead = opening_tokens(tokenizer)
    if seq_len <= max(1, len(lead)):
        raise UserError(
            f"autoquant.seq_len={seq_len} leaves no token to predict behind the {len(lead)} that open a row; use "
            f"{len(lead) + 1} or more"
        )
    texts, counted = [], []
    for caption, ids in zip(captions, _token_ids(captions, tokenizer), strict=True):
        texts.append([*ids, *separator])
        if isinstance(caption, Question):
            prompt = len(_token_ids([caption[: caption.answer]], tokenizer)[0])
            counted.append([*([False] * prompt), *([True] * (len(ids) - prompt)), *([False] * len(separator))])
        else:
            counted.append([True] * len(texts[-1]))
    return _Tokens(
        lead=lead,
        texts=texts,
        counted=counted,
        pad=next((token for token in (pad, eos) if token is not None), 0),
    )


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer opens a text with: one token, several, or none."""
    text = "a"
    whole, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return list(whole[: next(starts, 0)])


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """How a tokenizer's control tokens are spelled."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*getattr(tokenizer, "all_special_tokens", ()), *(str(token) for token in added if token.special)}


def _token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each text; prompt and answer of a question apart, so that no token is of both."""
    parts = [[t[: t.answer], t[t.answer :]] if isinstance(t, Question) else [t] for t in texts]
    tokens = iter(_text_tokens([part for those in parts for part in those], tokenizer))
    return [[token for _ in those for token in next(tokens)] for those in parts]


def _text_tokens(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of captions, control tokens that they spell out taken for text where the tokenizer can do so."""
    if _spelling(captions, tokenizer):
        with suppress(TypeError, ValueError):  # a tokenizer with code of its own may not know this setting
            return tokenizer(list(captions), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer(list(captions), add_special_tokens=False)["input_ids"]


def _spelling(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Positions of captions that spell out a control token."""
    control = control_tokens(tokenizer)
    return [at for at, caption in enumerate(captions) if any(token in caption for token in control)]


def _spelled_out(captions: Sequence[str], tokens: _Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is said of captions that spell out control tokens."""
    spelling = _spelling(captions, tokenizer)
    if not spelling:
        return []
    control = set(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer)))) - {tokenizer.unk_token_id}
    read = sum(not control.isdisjoint(tokens.texts[at][:-1]) for at in spelling)
    names = sorted(token for token in control_tokens(tokenizer) if any(token in captions[at] for at in spelling))
    said = f"{len(spelling)} of {len(captions)} captions spell out control tokens ({few(names)})"
    return [f"{said}: {read} were read as such" if read else f"{said}, which were taken for text"]


def _batches(tokens: _Tokens, packing: str, seq_len: int, batch_size: int) -> tuple[Batch, ...]:
    width = seq_len - len(tokens.lead)
    if packing == "packed":
        stream = [one for text in _marked(tokens) for one in text]
        bodies = [stream[at : at + width] for at in range(0, len(stream), width)]
    else:
        bodies = [text[:width] for text in _marked(tokens)]
    rows = [[*((token, body[0][1], False) for token in tokens.lead), *body] for body in bodies]
    rows = [row for row in rows if len(row) > max(1, len(tokens.lead))]  # a lone token predicts nothing
    if not rows:
        raise UserError("the captions hold no token to predict; give longer captions")
    if packing == "padded" and any(not any(one[2] for one in row[1:]) for row in rows):
        raise UserError(f"a question's answer lies beyond the {seq_len} tokens of a row; raise autoquant.seq_len")
    if packing == "padded":
        rows = [[*row, *[(tokens.pad, _PADDING, False)] * (seq_len - len(row))] for row in rows]
    chunks = (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))
    return tuple(Batch(tuple(_segments(chunk, packing == "padded"))) for chunk in chunks)


def _marked(tokens: _Tokens) -> list[list[tuple[int, int, bool]]]:
    """Per caption its tokens, each with the caption's number and whether it counts."""
    return [
        [(token, sample, counts) for token, counts in zip(text, counted, strict=True)]
        for sample, (text, counted) in enumerate(zip(tokens.texts, tokens.counted, strict=True))
    ]


def _segments(rows: list[list[tuple[int, int, bool]]], masked: bool) -> Iterator[Segment]:
    """Rows of (token, sample, counts) as tensors, one segment per row length."""
    for _, same in groupby(rows, key=len):
        all_three = torch.tensor(list(same), dtype=torch.int64)
        tokens, sample = all_three[..., 0].contiguous(), all_three[..., 1].to(torch.int32)
        loss_mask = all_three[..., 2].bool()
        attention_mask = (sample != _PADDING).to(torch.int64) if masked else None
        loss_mask[:, 0] = False
        yield Segment(tokens, attention_mask, loss_mask, sample)
