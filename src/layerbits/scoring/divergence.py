"""KL divergence from the unquantized model, and what else changes between two sets of logits.

The one place for it: :func:`divergence` for a pass over many tokens, :func:`token_changes` for a probe, and in float64
:func:`exact_divergence` and :func:`exact_difference` for the proof of a checkpoint and of what is served.

With ``d = z_q − z_p`` the difference of the logits, taken relative to its value at the token that came true, and
``φ(d) = exp(d) − 1 − d``, the loss changes by ``log Σ p·exp(d) = log1p(Σ p·d + Σ p·φ(d))``, and ``KL(P‖Q)`` is that
minus ``Σ p·d``. It is the same number as ``Σ p·(log p − log q)``, but ``φ ≥ 0``: no large terms cancel, so that a small
divergence keeps its relative precision, and one pass over the logits is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from layerbits.scoring.memory import free_bytes
from layerbits.scoring.steps import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from triton.runtime import JITFunction

_AT_ONCE = 1 << 21
"""Logits that are compared at once on a CPU: 8 MB in float32, near enough to its caches."""
_COMPARED_AT_ONCE = {"cpu": _AT_ONCE, "cuda": 1 << 27}
"""Whole logits that are compared at once: 512 MB in float32 on a GPU."""
_EXACT_ROWS = 64  # tokens whose distributions are compared at once in float64
_EXACT_AT_ONCE = 1 << 24
"""Logits of each model at once in float64: 128 MB."""
_MAY_KEEP = 0.25  # of the free memory, for kept logits
_LEAST, _MOST = -0.9, 1e30
"""Where ``Σ p·exp(d) − 1`` is outside, float32 has lost it: the logits moved too far. The partition sums themselves are
compared then."""


class Reference:
    """Unquantized predictions that others are compared with; their logits are kept where they fit, else made again.

    Args:
        logits_of: Makes logits of the values: the output head, or nothing.
        values: Hidden states or logits of ``n`` tokens, ``[n, ...]``.
        targets: Tokens that came true, ``[n]``.

    Attributes:
        vocabulary: Logits per token.
        kept_bytes: Memory of the kept logits.
        loss: Loss of the tokens that came true, nats, summed.
    """

    def __init__(
        self, logits_of: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, targets: torch.Tensor
    ) -> None:
        self._logits_of = logits_of
        self._values = values
        self._targets = targets
        self.vocabulary = int(logits_of(values[:1]).shape[-1])
        size = max(1, LOGITS_AT_ONCE // self.vocabulary)
        wanted = len(values) * self.vocabulary * values.element_size()
        keep = wanted < _MAY_KEEP * free_bytes(values.device)
        self.kept_bytes = wanted if keep else 0
        pieces, partition = [], []
        loss: torch.Tensor | float = 0.0
        for piece, true in zip(values.split(size), targets.split(size), strict=True):
            logits = logits_of(piece)
            partition.append(log_partition(logits))
            loss = loss + (partition[-1] - logits.gather(1, true[:, None])[:, 0].float()).double().sum()
            if keep:
                pieces.append(logits)
        self._kept = torch.cat(pieces) if keep else None
        self._partition = torch.cat(partition)
        self.loss = float(loss)

    def compare(self, span: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The :func:`divergence` of logits ``[K, n, vocabulary]`` of the tokens in a span."""
        own = self._logits_of(self._values[span]) if self._kept is None else self._kept[span]
        return divergence(own, self._partition[span], logits, self._targets[span])


@dataclass(frozen=True)
class TokenChanges:
    """What a changed model predicts beside the unquantized one, each ``[n]``, where the changed model's logits are.

    Attributes:
        kl: KL(unquantized ‖ changed), nats. loss: Change of the cross-entropy, nats.
        largest: Largest absolute error of a logit. squares: Squared errors of the logits, summed over the vocabulary.
        same_top: Whether the most likely token is the same.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    largest: torch.Tensor
    squares: torch.Tensor
    same_top: torch.Tensor


def token_changes(
    reference: torch.Tensor, partition: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> TokenChanges:
    """Compares whole logits, piece by piece.

    Args:
        reference: Logits of the unquantized model, ``[n, vocabulary]``, on any device.
        partition: Their :func:`log_partition`, ``[n]``.
        logits: Logits of the changed model, ``[n, vocabulary]``; another dtype is compared in float32.
        targets: Tokens that came true, ``[n]``.
    """
    size = max(1, _COMPARED_AT_ONCE[logits.device.type] // logits.shape[1])
    parts = []
    for start in range(0, len(logits), size):
        span = slice(start, start + size)
        ours, own = logits[span], reference[span].to(logits.device)
        if ours.dtype != own.dtype:
            ours, own = ours.float(), own.float()
        kl, loss = divergence(own, partition[span], ours[None], targets[span])
        same = ours.argmax(-1) == own.argmax(-1)
        error = ours.float() - own.float()
        squares = torch.linalg.vecdot(error, error)
        parts.append((kl[0], loss[0], error.abs_().amax(-1), squares, same))
    return TokenChanges(*(torch.cat(values) for values in zip(*parts, strict=True)))


def exact_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ other) of each token in float64, nats, ``[n]``.

    For a few tokens, where both distributions are there as a whole.

    Args:
        reference: Log-probabilities, ``[n, vocabulary]``.
        other: Those of the other model.
    """
    pairs = zip(reference.split(_EXACT_ROWS), other.split(_EXACT_ROWS), strict=True)
    return torch.cat([_exact(p.double(), q.double()) for p, q in pairs])


@dataclass(frozen=True)
class LogitDifference:
    """How far a model's logits are from another's.

    Attributes:
        rms: Root mean square of the differences. largest: The largest.
        kl: Mean KL divergence from the other model's distribution, nats per token.
    """

    rms: float
    largest: float
    kl: float


def exact_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> LogitDifference:
    """Logits against others in float64.

    Args:
        ours: Per segment ``[tokens, vocabulary]``.
        theirs: Of the other model, the same shapes.
    """
    squares, largest, kl, tokens, values = 0.0, 0.0, 0.0, 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        size = max(1, _EXACT_AT_ONCE // mine.shape[1])
        for start in range(0, len(mine), size):
            a, b = mine[start : start + size].double(), other[start : start + size].double()
            error = a - b
            squares += float(error.square().sum())
            largest = max(largest, float(error.abs().max()))
            kl += float(_exact(b.log_softmax(-1), a.log_softmax(-1)).sum())
            tokens, values = tokens + len(a), values + a.numel()
    return LogitDifference(math.sqrt(squares / values), largest, kl / tokens)


def log_partition(logits: torch.Tensor) -> torch.Tensor:
    """``log Σ exp(z)`` in float32, ``[n]``, from logits ``[n, vocabulary]``."""
    rows = max(1, _AT_ONCE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return torch.cat([piece.float().logsumexp(dim=-1) for piece in logits.split(max(1, rows))])


def divergence(
    reference: torch.Tensor, partition: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence and loss change per token, against one reference.

    Args:
        reference: Logits of the unquantized model, ``[n, vocabulary]``, contiguous, any float dtype.
        partition: Their :func:`log_partition`, ``[n]``.
        logits: Logits of ``K`` perturbed models, ``[K, n, vocabulary]``, same dtype.
        targets: Tokens that came true, ``[n]``.

    Returns:
        float32 ``[K, n]`` KL(reference ‖ perturbed) in nats, and float32 ``[K, n]`` cross-entropy of the perturbed
        model minus that of the reference.
    """
    if logits.is_cuda:
        return _fused(reference, partition, logits.contiguous(), targets)
    return _in_pieces(reference, partition, logits, targets)


def _in_pieces(
    reference: torch.Tensor, partition: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles, tokens, vocabulary = logits.shape
    kl, change = (torch.empty((tiles, tokens), device=logits.device) for _ in range(2))
    size = max(1, _AT_ONCE // vocabulary)
    for start in range(0, tokens, size):
        span = slice(start, start + size)
        z = reference[span].float()
        p = (z - partition[span, None]).exp_()
        for k in range(tiles):
            d = logits[k, span].float() - z
            shift = d.gather(1, targets[span, None])
            d -= shift
            mean = torch.linalg.vecdot(p, d).double()
            whole = mean + torch.linalg.vecdot(p, torch.expm1(d).sub_(d)).double()
            log_ratio = torch.log1p(whole)
            plain = (whole > _LEAST) & (whole < _MOST)
            if not bool(plain.all()):
                apart = log_partition(logits[k, span]) - partition[span] - shift[:, 0]
                log_ratio = torch.where(plain, log_ratio, apart.double())
            kl[k, span], change[k, span] = log_ratio - mean, log_ratio
    return kl, change


def _fused(
    reference: torch.Tensor, partition: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles, tokens, vocabulary = logits.shape
    kl, change = (torch.empty((tiles, tokens), dtype=torch.float32, device=logits.device) for _ in range(2))
    with torch.cuda.device(logits.device):
        _kernel()[(tiles * tokens,)](
            reference,
            partition,
            logits,
            targets,
            kl,
            change,
            tokens,
            vocabulary,
            _LEAST,
            _MOST,
            BLOCK=4096,
            num_warps=8,
        )
    return kl, change


def _exact(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (reference.exp() * (reference - other)).sum(-1)


@cache
def _kernel() -> JITFunction:
    import triton

    from layerbits.scoring import divergence_kernel

    return triton.jit(divergence_kernel.row_divergence)
