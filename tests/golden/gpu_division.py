"""FP32 division as Triton compiles it, to measure the GPU's reciprocal. Needs CUDA and Triton."""

import torch
import triton
import triton.language as tl


@triton.jit
def _divide_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    a = tl.load(a_ptr + offsets, mask=inside)
    b = tl.load(b_ptr + offsets, mask=inside)
    tl.store(out_ptr + offsets, a / b, mask=inside)


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a / b`` of two contiguous CUDA tensors of one shape."""
    out = torch.empty_like(a)
    _divide_kernel[(triton.cdiv(a.numel(), 1024),)](a, b, out, a.numel(), BLOCK=1024)
    return out


def reciprocals() -> torch.Tensor:
    """``[2**23]`` bit patterns (int32) of ``1 / x`` for every FP32 ``x`` from 1 to 2, on CUDA."""
    x = (torch.arange(2**23, dtype=torch.int32, device="cuda") + 0x3F800000).view(torch.float32)
    return divide(torch.ones_like(x), x).view(torch.int32)
