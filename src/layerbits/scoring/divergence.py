"""What a perturbation does to the predicted token: KL divergence and loss change, from two sets of logits.

With ``d = z_q − z_p`` the difference of the logits and ``φ(d) = exp(d) − 1 − d``, the log ratio of the two partition
sums is ``log Σ p·exp(d) = log1p(Σ p·d + Σ p·φ(d))``, and ``KL(P‖Q)`` is that minus ``Σ p·d``. It is the same number as
``Σ p·(log p − log q)``, but ``φ ≥ 0``: no large terms cancel, so that a small divergence keeps its relative precision,
and one pass over the logits is enough.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_AT_ONCE = 1 << 21
"""Logits that are compared at once on a CPU: 8 MB in float32, near enough to its caches."""


def log_partition(logits: Any) -> Any:
    """``log Σ exp(z)`` in float32, ``[n]``, from logits ``[n, vocabulary]``."""
    import torch

    rows = max(1, _AT_ONCE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return torch.cat([piece.float().logsumexp(dim=-1) for piece in logits.split(max(1, rows))])


def divergence(reference: Any, partition: Any, logits: Any, targets: Any) -> tuple[Any, Any]:
    """KL divergence and loss change per token, against one reference.

    Args:
        reference: Logits of the unquantized model, ``[n, vocabulary]``, any float dtype.
        partition: Their :func:`log_partition`, ``[n]``.
        logits: Logits of ``K`` perturbed models, ``[K, n, vocabulary]``, same dtype.
        targets: Tokens that came true, ``[n]``.

    Returns:
        float32 ``[K, n]`` KL(reference ‖ perturbed) in nats, and float32 ``[K, n]`` cross-entropy of the perturbed
        model minus that of the reference.
    """
    import torch

    kl, ratio = (_fused if logits.is_cuda else _in_pieces)(reference, partition, logits)
    at = targets[:, None]
    true = logits.gather(2, at.expand(len(logits), -1, -1))[..., 0].float() - reference.gather(1, at)[:, 0].float()
    return kl, ratio - torch.as_tensor(true)


def _in_pieces(reference: Any, partition: Any, logits: Any) -> tuple[Any, Any]:
    import torch

    tiles, tokens, vocabulary = logits.shape
    kl, ratio = (torch.empty((tiles, tokens), device=logits.device) for _ in range(2))
    size = max(1, _AT_ONCE // vocabulary)
    for start in range(0, tokens, size):
        span = slice(start, start + size)
        z = reference[span].float()
        p = (z - partition[span, None]).exp_()
        for k in range(tiles):
            d = logits[k, span].float() - z
            mean = torch.linalg.vecdot(p, d).double()
            excess = torch.linalg.vecdot(p, torch.expm1(d).sub_(d)).double()
            log_ratio = torch.log1p(mean + excess)
            if not bool(torch.isfinite(log_ratio).all()):  # a logit grew by more than float32's exp can take
                log_ratio = (log_partition(logits[k, span]) - partition[span]).double()
            kl[k, span], ratio[k, span] = log_ratio - mean, log_ratio
    return kl, ratio


def _fused(reference: Any, partition: Any, logits: Any) -> tuple[Any, Any]:
    import torch

    tiles, tokens, vocabulary = logits.shape
    kl, ratio = (torch.empty((tiles, tokens), dtype=torch.float32, device=logits.device) for _ in range(2))
    logits, reference = logits.contiguous(), reference.contiguous()
    with torch.cuda.device(logits.device):
        _kernel()[(tiles * tokens,)](
            reference, partition, logits, kl, ratio, tokens, vocabulary, BLOCK=4096, num_warps=8
        )
    return kl, ratio


@cache
def _kernel() -> Any:
    import triton

    from layerbits.scoring import divergence_kernel

    return triton.jit(divergence_kernel.row_divergence)
