"""Golden tensors of NVFP4 with stored block ranges: ModelOpt's Triton kernels in Triton's interpreter, on a CPU.

    pip install --no-deps --target FOLDER triton==3.6.0
    TRITON_INTERPRET=1 PYTHONPATH=src:.:FOLDER python tests/golden/make_blocks.py OUTPUT_FOLDER

Writes ``blocks.npz``: results in float32, for the interpreter cuts numbers off where a GPU rounds them to bfloat16. It
divides correctly rounded where a GPU multiplies with a reciprocal, so results are those of a GPU to a few units in the
last place. The tests import :func:`cases` from here, those on a GPU :func:`kernel` too.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tests.golden.make_fp4 import DTYPES, _exponents, _grid, _inputs, _neighbours, _normal, to_bits

KINDS = ("mxfp8", "nvfp4_static", "nvfp4_four_over_six", "nvfp4_sweep")
NVFP4_BLOCK = 16
_LARGE = 256  # rows and blocks a row of weights that the sweep is tried on


@dataclass(frozen=True)
class Case:
    """One tensor to quantize.

    Attributes:
        kind: One of :data:`KINDS`; a sweep's result is the chosen ranges.
        block_size: Values a block.
        amax: Stored ranges of its blocks, ``None`` where none are stored or the sweep finds them.
        global_amax: Range that the scale of scales is made for.
        golden: Whether its result is small enough to be kept; larger ones are compared on a GPU alone.
    """

    name: str
    kind: str
    x: torch.Tensor
    block_size: int = NVFP4_BLOCK
    amax: torch.Tensor | None = None
    global_amax: torch.Tensor | None = None
    golden: bool = True


def cases() -> Iterator[Case]:
    """Every case, the same on every machine."""
    for short, dtype in DTYPES.items():
        for name, x in _inputs(dtype):
            yield Case(f"mxfp8/{short}/{name}", "mxfp8", x, 32)
        for size in (8, 16):
            yield Case(f"mxfp8/{short}/block_{size}", "mxfp8", _normal(31, 8, 96).to(dtype), size)
        yield Case(f"mxfp8/{short}/bounds", "mxfp8", _e4m3_bounds(dtype), 32)
        yield Case(f"mxfp8/{short}/amax_edges", "mxfp8", _amax_edges(dtype), 32)
        for name, x in _weights(dtype):
            yield from _static(f"{short}/{name}", x)
    for short, dtype in DTYPES.items():
        large = (_normal(90, _LARGE, 16 * _LARGE) * 0.02).to(dtype).reshape(-1, NVFP4_BLOCK)
        yield from (Case(**{**vars(c), "golden": False}) for c in _static(f"{short}/large", large))
        wide = _exponents(91, dtype, (_range(92, dtype, 1024, 32))).reshape(-1, 32)
        yield Case(f"mxfp8/{short}/large", "mxfp8", wide, 32, golden=False)


def digest(case: Case) -> str:
    """Digest of a case's input, to tell a drifted recipe from a wrong result."""
    parts = [case.x, *(t.reshape(-1) for t in (case.amax, case.global_amax) if t is not None)]
    return hashlib.sha256(b"".join(to_bits(t).tobytes() for t in parts)).hexdigest()[:16]


def ours(case: Case, device: str = "cpu") -> torch.Tensor:
    """LayerBits' arithmetic on one device."""
    from layerbits.candidates import nvfp4_static as static
    from layerbits.candidates.mxfp8 import mxfp8

    x = case.x.to(device)
    if case.kind == "mxfp8":
        return mxfp8(x, case.block_size)
    assert case.global_amax is not None
    if case.kind == "nvfp4_sweep":
        return static.sweep(x, case.global_amax.to(device))
    assert case.amax is not None
    fp8_max = static.FP8_MAX_FOUR_OVER_SIX if case.kind == "nvfp4_four_over_six" else static.FP8_MAX
    return static.nvfp4_static(x, case.amax.to(device), case.global_amax.to(device), fp8_max)


def kernel(case: Case) -> torch.Tensor:
    """ModelOpt's CUDA kernels, called as its quantizers call them."""
    from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_scale_sweep
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant, static_blockwise_fp4_fake_quant

    x = case.x.cuda()
    if case.kind == "mxfp8":
        return dynamic_block_quant(x, case.block_size, None, None, (4, 3), (8, 0))
    assert case.global_amax is not None
    if case.kind == "nvfp4_sweep":
        return nvfp4_fp8_scale_sweep(x, case.global_amax.cuda(), NVFP4_BLOCK)
    assert case.amax is not None
    fp8_max = 256.0 if case.kind == "nvfp4_four_over_six" else 448.0
    return static_blockwise_fp4_fake_quant(x, case.amax.cuda(), case.global_amax.cuda(), True, fp8_max, x.dtype, True)


def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Differences of two float32 tensors, in units of FP32's precision of the number."""
    unit = torch.maximum(a.abs(), b.abs()).clamp(min=torch.finfo(torch.float32).tiny) * torch.finfo(torch.float32).eps
    return (a - b).abs() / unit


def ours_float32(case: Case) -> torch.Tensor:
    """LayerBits' arithmetic, its result not rounded to the dtype of the input."""
    return ours(replace(case, x=case.x.float()))


def worse(case: Case, chosen: torch.Tensor, others: torch.Tensor) -> float:
    """By how much, relative, the squared error of chosen ranges is above that of others, at most over the blocks."""
    from layerbits.candidates import nvfp4_static as static

    assert case.global_amax is not None
    errors = []
    for amax in (chosen.cpu(), others.cpu()):
        values = static.nvfp4_static(case.x.float(), amax, case.global_amax)
        errors.append((values - case.x.float()).double().square().sum(-1))
    return float(((errors[0] - errors[1]) / errors[1].clamp(min=1e-300)).max())


def _static(name: str, x: torch.Tensor) -> Iterator[Case]:
    """The cases of blocks ``[n, 16]``: under their own ranges, larger and smaller ones, and searched."""
    amax = x.float().abs().amax(-1)
    whole = amax.max()
    yield Case(f"nvfp4_static/{name}", "nvfp4_static", x, amax=amax, global_amax=whole)
    yield Case(f"nvfp4_static/{name}_shared", "nvfp4_static", x, amax=amax * 0.8, global_amax=whole * 1.7)
    yield Case(f"nvfp4_four_over_six/{name}", "nvfp4_four_over_six", x, amax=amax, global_amax=whole)
    yield Case(f"nvfp4_four_over_six/{name}_wide", "nvfp4_four_over_six", x, amax=amax * 1.5, global_amax=whole)
    if bool(x.isfinite().all()):
        yield Case(f"nvfp4_sweep/{name}", "nvfp4_sweep", x, global_amax=whole)


def _weights(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for scale in (3e-5, 0.02, 1.0):
        yield f"normal_{scale:g}", (_normal(41, 96, NVFP4_BLOCK) * scale).to(dtype)
    falling = torch.pow(2.0, -torch.arange(96.0) / 4)[:, None]
    yield "falling", (_normal(42, 96, NVFP4_BLOCK) * falling).to(dtype)
    yield "grid", _grid(43, 96, NVFP4_BLOCK).to(dtype)
    zero = torch.zeros(4, NVFP4_BLOCK)
    zero[1, 3], zero[2, ::2] = 1.5, -0.0
    yield "zero", zero.to(dtype)


def _range(seed: int, dtype: torch.dtype, *shape: int) -> np.ndarray:
    """Exponent fields over most of a dtype's range, alike within a row."""
    middle, width = (15, 10) if dtype == torch.float16 else (127, 100)
    rows = np.random.PCG64(seed).random_raw(shape[0]) % np.uint64(2 * width)
    return (middle - width + rows.astype(np.int64))[:, None] + np.zeros(shape, np.int64)


def _e4m3_bounds(dtype: torch.dtype) -> torch.Tensor:
    """Under power-of-two scales: numbers on, below and above every bound between two E4M3 numbers."""
    values = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    bounds = _neighbours((values[1:] + values[:-1]) / 2, dtype).float()
    rows = []
    for part in bounds.split(31):
        for k in (-9, 0, 5):
            row = torch.zeros(32)
            row[0], row[1 : 1 + len(part)] = 448.0, part
            rows.append((row * 2.0 ** (k if dtype != torch.float16 else min(k, 0))).to(dtype))
    return torch.stack(rows)


def _amax_edges(dtype: torch.dtype) -> torch.Tensor:
    """Blocks whose ``amax / 448`` is a power of two, or one step below or above it."""
    lowest, highest = (-20, 7) if dtype == torch.float16 else (-125, 118)
    rows = []
    for k in range(lowest, highest, 3):
        for head in _neighbours(torch.tensor([448.0 * math.pow(2.0, k)], dtype=torch.float64), dtype):
            rest = (_normal(2000 + k, 31).clamp(-1.0, 1.0).double() * 300.0 * math.pow(2.0, k)).to(dtype)
            rows.append(torch.cat([head[None], rest]))
    return torch.stack(rows)


def main(folder: Path) -> None:
    """Interprets every case of the file."""
    import modelopt
    import triton

    from tests.golden.interpreter import interpreted

    started = time.perf_counter()
    versions = {
        "source": "ModelOpt's Triton kernels in Triton's interpreter, float32 output, on a CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "modelopt": modelopt.__version__,
        "numpy": np.__version__,
    }
    print(versions)
    arrays, digests = {}, {}
    for case in cases():
        if case.golden and case.kind != "mxfp8":
            found = interpreted(case)
            print(f"{case.name:44s} {case.x.numel():6d} largest difference {apart(found, ours_float32(case)).max():g}")
            arrays[case.name], digests[case.name] = to_bits(found), digest(case)
    meta = np.frombuffer(json.dumps({"versions": versions, "digests": digests}).encode(), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "blocks.npz", meta=meta, **arrays)
    size = (folder / "blocks.npz").stat().st_size / 1024
    print(f"{len(arrays)} cases, {size:.0f} KiB; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
