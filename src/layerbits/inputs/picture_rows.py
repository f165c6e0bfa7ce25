"""Chats about pictures as token rows, made by the model's own processor and chat template.

A row is a chat, never cut and never padded. The loss counts the words of the answers after the last picture, or where
nobody answers, the words after it. Rows of one length share a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError, first_line
from layerbits.inputs.calibration import Batch, PictureRow, Segment
from layerbits.inputs.pictures import Message, Pictured
from layerbits.plain import JsonObject

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig, ProcessorMixin


@dataclass(frozen=True)
class Reader:
    """How pictures and words become tokens.

    Attributes:
        processor: From :func:`layerbits.inputs.processor.load_processor`.
        image_token: The placeholder of an image in the rows.
        min_pixels: Smaller pictures are enlarged to that before the processor sees them; ``None`` = as they are.
        max_pixels: Larger ones are reduced to that.
        positions: Tokens that a row may have; ``None`` where the model does not say.
        apart: Whether every row is a segment of its own, for a vision tower that is scored.
        known: Rows that were made, so that a chat is one row wherever it is used.
    """

    processor: ProcessorMixin
    image_token: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    positions: int | None = None
    apart: bool = False
    known: dict[int, tuple[Pictured, Row]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def template(self) -> str | None:
        """The chat template of the processor or its tokenizer; a base model has none."""
        parts = (self.processor, self.processor.tokenizer)
        found = next((t for t in (getattr(part, "chat_template", None) for part in parts) if t), None)
        return found.get("default") or next(iter(found.values())) if isinstance(found, dict) else found

    def row(self, chat: Pictured) -> Row:
        """A chat's row.

        Raises:
            UserError: As :func:`picture_batches`.
        """
        if id(chat) not in self.known:
            self.known[id(chat)] = chat, read_row(chat, self)
        return self.known[id(chat)][1]

    @classmethod
    def of(
        cls,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        apart: bool = False,
    ) -> Reader:
        """For a model's config.

        Raises:
            UserError: The placeholder of the processor is not that of the model.
        """
        said = getattr(config, "image_token_id", None)
        said = getattr(config, "image_token_index", None) if said is None else said
        own = _image_token(processor)
        if own is None or said not in (None, own):
            raise UserError(
                f"the processor marks images with token {own}, the model looks for {said}: they are not of one model; "
                "put the model's own processor files into the checkpoint"
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        positions = positions if isinstance(positions, int) else None
        return cls(processor, own, min_pixels, max_pixels, positions, apart)

    def sized(self, image: Image.Image) -> Image.Image:
        """A picture within ``min_pixels`` and ``max_pixels``, its sides in the same proportion."""
        from PIL import Image

        pixels = image.width * image.height
        wanted = max(self.min_pixels or 0, min(pixels, self.max_pixels or pixels))
        if wanted == pixels:
            return image
        factor = sqrt(wanted / pixels)
        # down where pixels must stay below a limit, up where they must reach one
        size = [int(side * factor) if factor < 1 else -int(-side * factor // 1) for side in image.size]
        return image.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Row:
    """A chat as tokens, ``[1, length]``."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    image_mask: torch.Tensor
    picture: PictureRow


def picture_batches(
    rows: Sequence[Pictured], reader: Reader, batch_size: int, samples: Sequence[int]
) -> tuple[Batch, ...]:
    """Batches of chats.

    Args:
        rows: The chats.
        reader: How they become tokens.
        batch_size: Chats a batch; the last may have fewer.
        samples: Position of each in the list of all captions.

    Raises:
        UserError: A picture or a chat cannot be used, with its file and row.
    """
    made = [(reader.row(row), sample) for row, sample in zip(rows, samples, strict=True)]
    chunks = (made[at : at + batch_size] for at in range(0, len(made), batch_size))
    return tuple(Batch(tuple(_segments(chunk, reader.apart))) for chunk in chunks)


def read_row(chat: Pictured, reader: Reader) -> Row:
    """A chat as tokens and pixels.

    Raises:
        UserError: As :func:`picture_batches`.
    """
    processor = reader.processor
    text, answers = _rendered(chat, reader)
    images = [reader.sized(picture.pixels()) for picture in chat.pictures]
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    try:
        made = dict(processor(images=images, text=[text], return_tensors="pt", add_special_tokens=special))
    except UserError:
        raise
    except Exception as error:  # whatever a processor makes of a picture that it cannot take
        raise UserError(f"{chat.name}: the processor cannot take it ({first_line(error)}); leave it out") from None
    ids = made.pop("input_ids")
    made.pop("attention_mask", None)
    inputs = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    image_mask = ids == reader.image_token
    length = ids.shape[1]
    if not bool(image_mask.any()):
        raise UserError(f"{chat.where}: its row has no image token; check the processor and its chat template")
    if reader.positions is not None and length > reader.positions:
        images_only = int(image_mask.sum())
        change = "shorten its words" if length - images_only > reader.positions else "lower dataset.max_pixels"
        raise UserError(
            f"{chat.name}: {length:,} tokens ({images_only:,} of images), more than the {reader.positions:,} "
            f"positions of the model; {change}"
        )
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for start, stop in answers(special):
        mask[:, length - start : length - stop] = True
    last = int(torch.nonzero(image_mask[0])[-1])
    mask[:, : last + 1] = False
    mask &= ~image_mask
    if not bool(mask.any()):
        raise _no_words(chat)
    return Row(ids, mask, image_mask, PictureRow(inputs, chat.where))


def _rendered(chat: Pictured, reader: Reader) -> tuple[str, Callable[[bool], Iterator[tuple[int, int]]]]:
    """The text of a chat, and a function that gives the tokens of its answers, counted from the end."""
    processor = reader.processor
    token = placeholder(processor)
    tokenizer = processor.tokenizer
    for mark in (token, str(tokenizer.convert_ids_to_tokens(reader.image_token))):
        if any(mark in text for text in chat.texts):
            raise UserError(f"{chat.where}: its words contain {mark}, the mark of a picture; take it out")
    template = reader.template
    if template is None:  # a base model: the pictures, then the words
        words = " ".join(part["text"] for turn in chat.messages if turn["role"] == "assistant" for part in _text(turn))
        words = words or " ".join(chat.texts)
        starts: list[tuple[str, str | None]]
        text, starts = token * len(chat.pictures) + words, [(token * len(chat.pictures), None)]
    else:
        if not _says_something(chat):  # the template's own marks are no words
            raise _no_words(chat)

        def render(messages: Sequence[Message], ask: bool) -> str:
            try:
                return str(
                    tokenizer.apply_chat_template(
                        list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask
                    )
                )
            except Exception as error:  # templates raise what they like
                raise UserError(
                    f"{chat.where}: the chat template fails on it ({first_line(error)}); use the chat template that "
                    "came with the model's processor"
                ) from None

        text = render(chat.messages, False)
        starts = []
        for i, turn in enumerate(chat.messages):
            if turn["role"] == "assistant" and i:
                end = None if i + 1 == len(chat.messages) else render(chat.messages[: i + 1], False)
                starts.append((render(chat.messages[:i], True), end))
    places = text.count(token)
    if places != len(chat.pictures):
        raise UserError(
            f"{chat.where}: the chat template has {places} places ({token}) for {len(chat.pictures)} pictures; use the "
            "chat template that came with the model's processor"
        )

    def answers(special: bool) -> Iterator[tuple[int, int]]:
        def ids(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=special)["input_ids"])

        whole = ids(text)
        for before, after in starts or [(text[: text.rindex(token) + len(token)], None)]:
            start = _common(whole, ids(before))
            stop = len(whole) if after is None else _common(whole, ids(after))
            yield len(whole) - start, len(whole) - stop

    return text, answers


def _image_token(processor: ProcessorMixin) -> int | None:
    """The token at the image positions of a row; ``None`` where the processor does not say.

    In transformers 5.14 a processor's ``image_token_id`` is that token. In 5.17 Gemma 3's is the token that stands for
    a picture before the processor sees the text, and ``image_token_ids`` has the one at image positions.
    """
    own = getattr(processor, "image_token_id", None)
    if own is None:
        own = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None))
    positions = [i for i in getattr(processor, "image_token_ids", None) or () if i is not None]
    return positions[0] if positions and own not in positions else own


def placeholder(processor: ProcessorMixin) -> str:
    """What stands for a picture in a text before the processor sees it: Gemma 3 has a token of its own for that."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def _text(turn: Message) -> list[JsonObject]:
    return [part for part in turn["content"] if part["type"] == "text"]


def _says_something(chat: Pictured) -> bool:
    """Whether there are words after the last picture: of answers, where somebody answers."""
    answered = any(turn["role"] == "assistant" for turn in chat.messages[1:])
    parts = [(turn["role"] == "assistant", part) for turn in chat.messages for part in turn["content"]]
    last = max(at for at, (_, part) in enumerate(parts) if part["type"] == "image")
    after = [part for answer, part in parts[last + 1 :] if answer or not answered]
    return any(part["type"] == "text" and part["text"].strip() for part in after)


def _no_words(chat: Pictured) -> UserError:
    return UserError(f"{chat.where}: there are no words after the picture to take a loss on; add some")


def _common(whole: Sequence[int], part: Sequence[int]) -> int:
    """Tokens that two lists begin with."""
    return next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))


def _segments(rows: Sequence[tuple[Row, int]], apart: bool) -> Iterator[Segment]:
    """Rows as segments: those whose tensors can be joined together, or each alone."""
    alike: dict[tuple[object, ...], list[tuple[Row, int]]] = {}
    for row, sample in rows:
        shapes = tuple((name, tuple(v.shape[1:])) for name, v in sorted(row.picture.inputs.items()))
        own = len(alike) if apart else 0
        alike.setdefault((row.input_ids.shape[1], shapes, own), []).append((row, sample))
    for same in alike.values():
        ids = torch.cat([row.input_ids for row, _ in same])
        yield Segment(
            ids,
            None,
            torch.cat([row.loss_mask for row, _ in same]),
            torch.tensor([sample for _, sample in same], dtype=torch.int32)[:, None].expand_as(ids).contiguous(),
            tuple(row.picture for row, _ in same),
            torch.cat([row.image_mask for row, _ in same]),
        )
