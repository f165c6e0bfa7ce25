"""What a model can be given and what can run it: its vocabulary, its positions, ModelOpt's own search."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Calibration, Segment
from layerbits.inputs.language_model import find_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_UNKNOWN = 0.5
"""Share of unknown tokens in the captions from which on they are not text to the model."""

MANY_UNKNOWN = 0.05
"""Share of unknown tokens from which on a reader is said."""

SMALL_TOKENIZER = 0.9
"""A tokenizer that knows a smaller share of a model's tokens is worth a warning.

Models pad their vocabulary to a round number, which is a few per cent at most.
"""

_PROBED = 4  # tokens
_SAME = 0.05  # of the spread of the logits; rounding is far below, an attention to later tokens far above

_TABLE_EXTRA = 4  # rows that a table of positions has beyond them (OPT: 2)


@dataclass(frozen=True)
class Limits:
    """What is known of a model before its weights are loaded.

    Attributes:
        name: Of the model, for errors.
        vocabulary: Rows of the token embedding.
        positions: Positions that it was made for, ``None`` where its config does not say.
        table: Whether they are rows of a table, so that there are no others.
        dropout: Largest probability of its dropout in training.
    """

    name: str
    vocabulary: int
    positions: int | None
    table: bool
    dropout: float

    def check(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Checks rows of tokens against the model.

        Returns:
            What a reader of the scores should know, a line each.

        Raises:
            UserError: Tokens that the model does not have, longer rows than it can take, or mostly unknown words.
        """
        segments = [s for batch in calibration.calib for s in batch.segments]
        largest = max(int(s.input_ids.max()) for s in segments)
        if largest >= self.vocabulary:
            raise UserError(
                f"the tokenizer of {self.name} gives token {largest}, the model has {self.vocabulary:,} tokens only: "
                "they are not of one model; put the model's own tokenizer files into the checkpoint"
            )
        return (*self._unknown(segments, tokenizer), *self._length(segments), *self._size(tokenizer))

    def _unknown(self, segments: list[Segment], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        unknown = tokenizer.unk_token_id
        if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            return []
        texts = [s.input_ids[s.sample >= 0] for s in segments]
        share = sum(int((t == unknown).sum()) for t in texts) / sum(t.numel() for t in texts)
        said = f"{share:.0%} of the tokens are {tokenizer.unk_token}, words that the tokenizer does not know"
        if share > MOST_UNKNOWN:
            raise UserError(f"{said}: it is not for this text; put the model's own tokenizer files into the checkpoint")
        return [f"{said}; scores are of a text with holes"] if share > MANY_UNKNOWN else []

    def _length(self, segments: list[Segment]) -> list[str]:
        longest = max(int(s.input_ids.shape[1]) for s in segments)
        if self.positions is None or longest <= self.positions:
            return []
        said = f"rows of {longest:,} tokens are longer than the {self.positions:,} positions of {self.name}"
        if self.table:
            raise UserError(f"{said}, which has no others; set autoquant.seq_len={self.positions} or less")
        return [f"{said}: it was not trained so far out; set autoquant.seq_len={self.positions} or less"]

    def _size(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        known = len(tokenizer)
        if known >= SMALL_TOKENIZER * self.vocabulary:
            return []
        return [
            f"the tokenizer knows {known:,} tokens, the model {self.vocabulary:,}: check that it is the model's own"
        ]


def limits_of(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> Limits:
    """Reads the limits of a model, which may be on the meta device.

    Args:
        model: The whole model.
        config: Its config.
        name: For errors.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    embedding = model.get_input_embeddings()
    return Limits(
        name=name,
        vocabulary=int(embedding.weight.shape[0]),
        positions=positions,
        table=positions is not None and _has_table(model, embedding, positions),
        dropout=dropout_of(model, text),
    )


def dropout_of(model: PreTrainedModel, config: PreTrainedConfig) -> float:
    """The largest probability of a model's dropout in training, of its modules and of attention."""
    modules = [float(m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    named = [getattr(config, key, None) for key in ("dropout", "attention_dropout", "hidden_dropout", "attn_pdrop")]
    return max([0.0, *modules, *(float(p) for p in named if isinstance(p, int | float))])


def check_causality(model: PreTrainedModel, calibration: Calibration, name: str) -> None:
    """Makes sure that a model predicts a token from those before it, by changing a later one.

    A model whose attention sees later tokens has a low loss and no gradient that means anything.

    Args:
        model: The loaded model, in eval mode.
        calibration: Its rows.
        name: For the error.

    Raises:
        UserError: A later token changes an earlier prediction.
    """
    row = calibration.score[0].segments[0].input_ids[:1, :_PROBED].to(model.get_input_embeddings().weight.device)
    both = row.repeat(2, 1)
    both[1, -1] = (both[1, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        first, second = model(input_ids=both).logits[:, :-1].double()
    if len(first) and float((first - second).abs().max()) > _SAME * float(first.std()):
        raise UserError(
            f"{name} is no causal language model: a later token changes what it predicts before it; give a model that "
            "reads from left to right"
        )


def check_stock(model: PreTrainedModel) -> None:
    """Refuses a model that ModelOpt's own search is known to fail on, as far as an empty model tells.

    ModelOpt 0.47 rewrites the attention classes of a model for a quantized cache whether it is asked for or not, and
    fails on the source of some (Bloom). Its hooks for gradients forbid a block to change the output of a linear in
    place (Falcon).

    Args:
        model: The whole model on the meta device; it stays as it is.

    Raises:
        Unsupported: It does.
    """
    from modelopt.torch.quantization.plugins.huggingface import register_hf_attentions_on_the_fly

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            register_hf_attentions_on_the_fly(model)
        _run_hooked(model)
    except Exception as error:  # whatever its rewriting makes of a class
        raise stock_fails(model, error) from None


def stock_fails(model: PreTrainedModel, error: Exception) -> Unsupported:
    """The one line for a model that ModelOpt's search does not run."""
    why = str(error).strip().partition("\n")[0].partition(". ")[0]
    return Unsupported(
        f"autoquant.engine=stock cannot run a {type(model).__name__}, ModelOpt's search fails on it "
        f"({type(error).__name__}: {why}); use autoquant.engine=onepass"
    )


def _run_hooked(model: PreTrainedModel) -> None:
    """A forward pass without numbers under hooks for gradients, as ModelOpt sets them."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_full_backward_hook(lambda *_: None) for m in linears]
    try:
        model(input_ids=torch.zeros((1, 4), dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # a model whose forward pass needs numbers tells nothing here
        if "BackwardHookFunction" in str(error):
            raise
    finally:
        for handle in handles:
            handle.remove()


def _has_table(model: PreTrainedModel, embedding: nn.Module, positions: int) -> bool:
    """Whether the language model holds a table with a row per position: an embedding, or a buffer of sines."""
    _, part = find_language_model(model)
    embeddings = [m.weight for m in part.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    tables = [*embeddings, *(b for b in part.buffers() if b is not None and b.dim() == 2)]
    return any(positions <= len(table) <= positions + _TABLE_EXTRA for table in tables)
