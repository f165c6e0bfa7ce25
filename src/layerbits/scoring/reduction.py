"""The inner product of the score: per token, the squared gradient-weighted output error."""

from __future__ import annotations

from functools import cache
from typing import Any

CLAMP = 1e10
"""ModelOpt clamps gradient × error at this magnitude before squaring; so do we."""


def token_scores(gradient: Any, quantized: Any, output: Any) -> Any:
    """Sum over output features of ``(g · (y_c − y))²``, ModelOpt's gradient score before it sums over tokens.

    The difference is rounded to the model's dtype, as ModelOpt's is, then everything is float32.

    Args:
        gradient: dL/dy, ``[..., out_features]``.
        quantized: Output with the candidate's quantizers, same shape and dtype.
        output: Output of the unquantized linear, same shape and dtype.

    Returns:
        float32 ``[tokens]``, the leading dimensions flattened.
    """
    features = output.shape[-1]
    gradient, quantized, output = (t.reshape(-1, features) for t in (gradient, quantized, output))
    if output.is_cuda:
        return _fused(gradient.contiguous(), quantized.contiguous(), output.contiguous())
    error = (quantized - output).float().mul_(gradient)
    return error.clamp_(-CLAMP, CLAMP).square_().sum(dim=-1)


def _fused(gradient: Any, quantized: Any, output: Any) -> Any:
    import torch
    import triton

    tokens, features = output.shape
    scores = torch.empty(tokens, dtype=torch.float32, device=output.device)
    block = min(4096, triton.next_power_of_2(features))
    with torch.cuda.device(output.device):
        _kernel()[(tokens,)](gradient, quantized, output, scores, features, CLAMP, BLOCK=block, num_warps=8)
    return scores


@cache
def _kernel() -> Any:
    import triton

    from layerbits.scoring import reduction_kernel

    return triton.jit(reduction_kernel.row_scores)
