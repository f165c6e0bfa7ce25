"""ModelOpt's Triton kernels of NVFP4 on a CPU: run with ``TRITON_INTERPRET=1``; needs triton, which no lock has."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl  # noqa: F401  # Triton wants it beside a function of its own
from triton.language.extra.cuda import libdevice

from tests.golden.make_blocks import NVFP4_BLOCK, Case

_SWEPT = 32  # blocks a program


@triton.jit
def _isnan(x):
    return x != x


libdevice.isnan = _isnan  # the interpreter has no libdevice
torch.cuda.device = lambda _device: contextlib.nullcontext()

from modelopt.torch.kernels.quantization.gemm import fp4_kernel, nvfp4_fp8_sweep  # noqa: E402


def interpreted(case: Case) -> torch.Tensor:
    """What the kernels compute of an NVFP4 case, as its ``kernel`` calls them; values in float32."""
    assert case.global_amax is not None
    if case.kind == "nvfp4_sweep":
        best = torch.empty(len(case.x))
        scales = nvfp4_fp8_sweep.fp8_scale_candidates(case.x.device).float()
        nvfp4_fp8_sweep._fp8_scale_sweep_kernel.fn[(-(-len(case.x) // _SWEPT),)](
            case.x,
            scales,
            case.global_amax.float().reshape(1),
            best,
            len(case.x),
            BLOCK_SIZE=NVFP4_BLOCK,
            NUM_CANDIDATES=len(scales),
            BLOCKS_PER_PROGRAM=_SWEPT,
        )
        return best
    fp8_max = 256.0 if case.kind == "nvfp4_four_over_six" else 448.0
    return fp4_kernel.static_blockwise_fp4_fake_quant(case.x, case.amax, case.global_amax, True, fp8_max, torch.float32)
