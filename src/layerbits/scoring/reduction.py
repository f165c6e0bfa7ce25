"""The two reductions of the scores: per token, squared or signed sums of the gradient-weighted output error."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from triton.runtime import JITFunction

CLAMP = 1e10
"""ModelOpt clamps gradient × error at this magnitude before squaring; so do we."""


def token_scores(
    gradient: torch.Tensor, quantized: torch.Tensor, output: torch.Tensor, signed: bool = False
) -> torch.Tensor:
    """Sum over output features of ``(g · (y_c − y))²``, ModelOpt's gradient score before it sums over tokens.

    The difference is rounded to the model's dtype, as ModelOpt's is, then everything is float32.

    Args:
        gradient: dL/dy, ``[..., out_features]``.
        quantized: Outputs with ``n`` quantized weights side by side, ``[..., n * out_features]``.
        output: Output of the unquantized linear, ``[..., out_features]``, all of one dtype.
        signed: Whether to leave out the square: ``Σ g · (y_c − y)``, the token's first-order change of the loss.

    Returns:
        float32 ``[n, tokens]``, the leading dimensions flattened.
    """
    features = output.shape[-1]
    many = quantized.shape[-1] // features
    gradient, output = (t.reshape(-1, features) for t in (gradient, output))
    quantized = quantized.reshape(-1, many, features)
    if output.is_cuda:
        return _fused(gradient.contiguous(), quantized, output.contiguous(), signed)
    error = (quantized - output[:, None]).float().mul_(gradient[:, None])
    error = error.clamp_(-CLAMP, CLAMP)
    return (error if signed else error.square_()).sum(dim=-1).T


def _fused(gradient: torch.Tensor, quantized: torch.Tensor, output: torch.Tensor, signed: bool) -> torch.Tensor:
    import triton

    tokens, many, features = quantized.shape
    scores = torch.empty(many, tokens, dtype=torch.float32, device=output.device)
    rows = triton.next_power_of_2(many)
    block = max(64, min(4096 // rows, triton.next_power_of_2(features)))
    with torch.cuda.device(output.device):
        _kernel()[(tokens,)](
            gradient,
            quantized,
            output,
            scores,
            features,
            many,
            tokens,
            CLAMP,
            SIGNED=signed,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
        )
    return scores


@cache
def _kernel() -> JITFunction:
    import triton

    from layerbits.scoring import reduction_kernel

    return triton.jit(reduction_kernel.row_scores)
