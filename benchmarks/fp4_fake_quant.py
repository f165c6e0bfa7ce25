"""Times FP4 fake quantization in plain PyTorch against ModelOpt's FP8 one on the CPU, per element.

PYTHONPATH=src python benchmarks/fp4_fake_quant.py
"""

import time
from collections.abc import Callable

import torch
from modelopt.torch.quantization.tensor_quant import fp8_eager

from layerbits.candidates.fp4 import mxfp4, nvfp4

SHAPES = ((576, 1536), (2048, 2048))
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 30


def nanoseconds_per_element(functions: dict[str, Callable[[], torch.Tensor]], elements: int) -> dict[str, float]:
    """Best of the rounds; the functions take turns, so that other load meets all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: seconds / elements * 1e9 for name, seconds in best.items()}


def main() -> None:
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {ROUNDS}; ns per element (ratio to FP8)"
    )
    print(f"{'shape':>12s} {'dtype':>9s} {'FP8':>7s} {'MXFP4':>15s} {'NVFP4':>15s}")
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            amax = x.abs().amax()
            functions = {
                "fp8": lambda x=x, amax=amax: fp8_eager(x, amax),
                "mxfp4": lambda x=x: mxfp4(x),
                "nvfp4": lambda x=x, amax=amax: nvfp4(x, amax),
            }
            took = nanoseconds_per_element(functions, x.numel())
            fp4 = " ".join(f"{took[n]:7.2f} ({took[n] / took['fp8']:4.2f}x)" for n in ("mxfp4", "nvfp4"))
            size = f"{shape[0]}x{shape[1]}"
            print(f"{size:>12s} {str(dtype).removeprefix('torch.'):>9s} {took['fp8']:7.2f} {fp4}")


if __name__ == "__main__":
    main()
