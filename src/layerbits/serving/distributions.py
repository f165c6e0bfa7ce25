"""Distributions of the next token as a server tells them, and their KL divergence (no torch).

A server tells the ``k`` most likely tokens of each position, each model its own ones. Two models are compared on events
that both tell: every token in both lists, and all the others together as one. Merging events cannot increase a KL
divergence, so what comes out is a lower bound, and equal to it where the whole vocabulary is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from layerbits.errors import UserError
from layerbits.plain import JsonMapping
from layerbits.results.result import FloatArray

Ints = NDArray[np.int64]

_LEAST = 1e-6
"""Mass of the others below which it is rounding: log-probabilities are float32 and sum to 1 to a few 1e-6."""
_STRIDE = 1 << 32  # position * _STRIDE + token names an event


@dataclass(frozen=True)
class Distributions:
    """Log-probabilities of some tokens at each of ``positions`` positions, ``E`` events in all.

    Attributes:
        events: ``[E]`` ascending position * 2^32 + token.
        logprobs: ``[E]`` nats.
        own: ``[positions]`` log-probability of the token that the text has there.
    """

    positions: int
    events: Ints
    logprobs: FloatArray
    own: FloatArray

    def at(self, events: Ints) -> FloatArray:
        """Log-probabilities of events that are listed here."""
        return np.asarray(self.logprobs[np.searchsorted(self.events, events)])

    @property
    def finite(self) -> bool:
        """Whether all are numbers."""
        return bool(np.isfinite(self.logprobs).all() and np.isfinite(self.own).all())


@dataclass(frozen=True)
class Events:
    """What two or more servers tell of the same positions."""

    positions: int
    events: Ints

    @cached_property
    def position(self) -> Ints:
        """``[E]`` position of each event."""
        return self.events // _STRIDE

    @cached_property
    def token(self) -> Ints:
        """``[E]`` token of each event."""
        return self.events % _STRIDE

    def kl(self, ours: FloatArray, theirs: FloatArray) -> FloatArray:
        """KL divergence of ``theirs`` from ``ours`` at each position, ``Σ p (log p - log q)``.

        Args:
            ours: ``[E]`` log-probabilities ``log p``.
            theirs: ``[E]`` log-probabilities ``log q``.

        Returns:
            ``[positions]`` nats.
        """
        p, q = np.exp(ours), np.exp(theirs)
        listed = np.bincount(self.position, p * (ours - theirs), self.positions)
        rest_p, rest_q = (np.maximum(1.0 - np.bincount(self.position, mass, self.positions), _LEAST) for mass in (p, q))
        return np.asarray(listed + rest_p * np.log(rest_p / rest_q))

    def mass(self, ours: FloatArray) -> float:
        """Mean mass of the events that are listed one by one."""
        return float(np.bincount(self.position, np.exp(ours), self.positions).mean())


def shared(first: Distributions, *others: Distributions) -> Events:
    """The events that all tell.

    Raises:
        UserError: They are not of the same positions.
    """
    events = first.events
    for other in others:
        if other.positions != first.positions:
            raise UserError(f"{other.positions} positions came instead of {first.positions}; compare on one text")
        events = np.intersect1d(events, other.events, assume_unique=True)
    return Events(first.positions, events)


def read(rows: Sequence[Sequence[JsonMapping | None]], texts: Sequence[Sequence[int]]) -> list[Distributions]:
    """Reads ``prompt_logprobs`` of an OpenAI-compatible completion.

    Args:
        rows: Per text and token a mapping token id → ``{"logprob": …}``, ``None`` for the first.
        texts: The texts' token ids.

    Returns:
        Per text the distributions of its tokens but the first.

    Raises:
        UserError: It is of other texts.
    """
    distributions = []
    for tokens, text in zip(rows, texts, strict=True):
        if len(tokens) != len(text):
            raise UserError(f"log-probabilities of {len(tokens)} tokens came back for a text of {len(text)}")
        events, logprobs, own = [], [], []
        for position, (entries, token) in enumerate(zip(tokens[1:], text[1:], strict=True)):
            if not entries or str(token) not in entries:
                raise UserError(f"no log-probability came back for token {position + 1} of a text")
            ids = np.fromiter(map(int, entries), np.int64, len(entries))
            values = np.fromiter((entry["logprob"] for entry in entries.values()), np.float64, len(entries))
            order = np.argsort(ids)
            events.append(position * _STRIDE + ids[order])
            logprobs.append(values[order])
            own.append(float(entries[str(token)]["logprob"]))
        distributions.append(Distributions(len(own), np.concatenate(events), np.concatenate(logprobs), np.asarray(own)))
    return distributions


def select(rows: Sequence[Distributions], wanted: Sequence[NDArray[np.bool_]]) -> Distributions:
    """Puts the wanted positions of some texts one after the other.

    Args:
        rows: Per text.
        wanted: Per text ``[positions]``.
    """
    events, logprobs, own, first = [], [], [], 0
    for row, keep in zip(rows, wanted, strict=True):
        place = np.cumsum(keep) - 1 + first
        position = row.events // _STRIDE
        kept = keep[position]
        events.append(place[position[kept]] * _STRIDE + row.events[kept] % _STRIDE)
        logprobs.append(row.logprobs[kept])
        own.append(row.own[keep])
        first += int(keep.sum())
    return Distributions(first, np.concatenate(events), np.concatenate(logprobs), np.concatenate(own))
