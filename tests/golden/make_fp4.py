"""Makes the golden FP4 tensors on a CUDA GPU and compares ``layerbits.candidates.fp4`` with ModelOpt's kernels there.

    PYTHONPATH=src python tests/golden/make_fp4.py OUTPUT_FOLDER

Writes ``fp4.npz`` (the kernels' outputs as raw bits and a digest of each input; the inputs themselves come from
:func:`cases` again) and ``rcp.npz`` (where the GPU's reciprocal differs from the correctly rounded one, what
``fit_reciprocal.py`` reads), and prints for every case how many elements differ between the kernels and ours. The tests
import :func:`cases` and :func:`stress_cases` from here.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
SHOWN_MISMATCHES = 6


@dataclass(frozen=True)
class Case:
    """One tensor to quantize.

    Attributes:
        kind: ``mxfp4`` or ``nvfp4``.
        amax: Global amax (FP32, no dimension) of an ``nvfp4`` case.
        golden: Whether equality is asked for; NaN inputs are only reported.
    """

    name: str
    kind: str
    x: torch.Tensor
    block_size: int
    amax: torch.Tensor | None = None
    golden: bool = True


def _raw(seed: int, *shape: int) -> np.ndarray:
    """Random 64-bit integers; the stream of a NumPy bit generator is the same everywhere and for ever."""
    return np.random.PCG64(seed).random_raw(math.prod(shape)).reshape(shape)


def _normal(seed: int, *shape: int) -> torch.Tensor:
    """Sums of four uniform 16-bit numbers, about standard normal, exact in FP32."""
    raw = _raw(seed, *shape)
    total = sum(((raw >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return torch.from_numpy(((total - 2 * 65535) / 2**15).astype(np.float32))


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Tensor with these bit patterns."""
    if dtype == torch.float32:
        return torch.from_numpy(bits.astype(np.uint32).view(np.int32)).view(dtype)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype)


def to_bits(x: torch.Tensor) -> np.ndarray:
    """Bit patterns of a tensor as unsigned integers."""
    if x.dtype == torch.float32:
        return x.cpu().contiguous().view(torch.int32).numpy().view(np.uint32)
    return x.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def _layout(dtype: torch.dtype) -> tuple[int, int, int]:
    """Mantissa bits, exponent bias, largest exponent field of a finite number."""
    return {torch.float32: (23, 127, 254), torch.bfloat16: (7, 127, 254), torch.float16: (10, 15, 30)}[dtype]


def _exponents(seed: int, dtype: torch.dtype, fields: np.ndarray) -> torch.Tensor:
    """Random sign and mantissa under the given exponent fields."""
    mantissa_bits = _layout(dtype)[0]
    raw = _raw(seed, *fields.shape)
    mantissa = (raw & np.uint64((1 << mantissa_bits) - 1)).astype(np.int64)
    sign = ((raw >> np.uint64(40)) & np.uint64(1)).astype(np.int64)
    width = 32 if dtype == torch.float32 else 16
    return from_bits((sign << (width - 1)) | (fields.astype(np.int64) << mantissa_bits) | mantissa, dtype)


def _neighbours(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[n] -> [3 n]`` positive values with the number below and the number above each."""
    bits = to_bits(values.to(dtype)).astype(np.int64)
    return from_bits(np.stack([bits, bits - 1, bits + 1], -1).reshape(-1), dtype)


def _inputs(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    _, bias, top = _layout(dtype)
    tiny_scale, huge_scale = (3e-5, 1e4) if dtype == torch.float16 else (3e-6, 1e30)
    for scale in (tiny_scale, 0.02, 1.0, huge_scale):
        yield f"normal_{scale:g}", (_normal(1, 24, 96) * scale).to(dtype)
    for n in (1, 17, 33, 48, 65):
        yield f"ragged_{n}", (_normal(2, 6, n) * 0.1).to(dtype)
    yield "one_dim", _normal(3, 100).to(dtype)
    yield "three_dims", _normal(4, 2, 3, 80).to(dtype)
    # Rows of falling magnitude: under one global scale their block scales go down to E4M3's subnormals and to zero.
    yield "falling_rows", (_normal(16, 24, 48) * torch.pow(2.0, -torch.arange(24.0))[:, None]).to(dtype)
    yield "subnormal", _exponents(5, dtype, np.zeros((12, 64), np.int64))
    yield "near_subnormal", _exponents(7, dtype, (_raw(8, 24, 64) % np.uint64(6)).astype(np.int64))
    # Every binade: a block of 32 whose largest number has this exponent field, the others up to 4 binades below.
    fields = np.arange(0, top + 1)[:, None] - (_raw(9, top + 1, 32) % np.uint64(5)).astype(np.int64)
    yield "every_binade", _exponents(10, dtype, np.maximum(fields, 0))
    zero = torch.zeros(4, 64)
    zero[1, ::2] = -0.0
    zero[2, 40] = 1.5
    yield "zero", zero.to(dtype)
    infinite = _normal(11, 6, 64)
    infinite[0, 3], infinite[1, 40], infinite[2, 0], infinite[2, 1] = math.inf, -math.inf, math.inf, -math.inf
    infinite[3, :] = -math.inf
    infinite[4, 5], infinite[4, 6] = math.inf, 0.0
    yield "infinite", infinite.to(dtype)
    yield "huge", _exponents(12, dtype, top - (_raw(13, 8, 64) % np.uint64(2)).astype(np.int64))
    # Power-of-two scales: the largest number is 6 * 2**k, the others lie on, below and above every rounding bound.
    ties = []
    for k in range(-bias + 2, top - bias - 2, 1 if dtype == torch.float16 else 9):
        block = _neighbours(torch.tensor(E2M1_BOUNDS, dtype=torch.float64) * 2.0**k, dtype)
        block = torch.cat([torch.tensor([6.0 * 2.0**k], dtype=torch.float64).to(dtype), block, -block[:10]])
        ties.append(block)
    yield "bounds", torch.stack(ties)
    # Blocks whose amax / 6 is a power of two, or one step below or above it.
    edges = []
    for k in range(-bias - 2, top - bias - 2, 1 if dtype == torch.float16 else 5):
        heads = _neighbours(torch.tensor([6.0 * 2.0**k], dtype=torch.float64), dtype)
        rest = (_normal(1000 + k, 3, 31).clamp(-1.5, 1.5).double() * 2.0**k * 3.0).to(dtype)
        edges.append(torch.cat([heads[:, None], rest], -1))
    yield "amax_edges", torch.cat(edges)
    # Few significant bits, so that exact ties with scales that are no power of two are common.
    yield "grid", _grid(14, 48, 64).to(dtype)


def _grid(seed: int, *shape: int) -> torch.Tensor:
    """Uniform integers from -127 to 127."""
    return torch.from_numpy((_raw(seed, *shape) % np.uint64(255)).astype(np.float32) - 127.0)


def _e4m3_values() -> torch.Tensor:
    """Every positive E4M3 number, in order."""
    return torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def cases() -> Iterator[Case]:
    """Every case, the same on every machine."""
    for short, dtype in DTYPES.items():
        for name, x in _inputs(dtype):
            yield Case(f"mxfp4/{short}/{name}", "mxfp4", x, 32)
            finite = x.float()[x.isfinite()]
            amax = finite.abs().max() if finite.numel() else torch.tensor(1.0)
            yield Case(f"nvfp4/{short}/{name}", "nvfp4", x, 16, amax)
            if name == "infinite":
                yield Case(f"nvfp4/{short}/{name}_amax", "nvfp4", x, 16, torch.tensor(math.inf))
            if name == "zero":
                yield Case(f"nvfp4/{short}/{name}_amax", "nvfp4", x, 16, torch.tensor(0.0))
            if name == "normal_1":
                yield Case(f"mxfp4/{short}/{name}_block16", "mxfp4", x[:8], 16)
                yield Case(f"mxfp4/{short}/{name}_block8", "mxfp4", x[:8], 8)
                yield Case(f"nvfp4/{short}/{name}_clipped", "nvfp4", x, 16, torch.tensor(0.7))
            if name == "grid":
                for amax_value in (78.0, 84.0, 90.0, 96.0, 108.0, 112.0, 120.0, 126.0):
                    yield Case(f"nvfp4/{short}/grid_{amax_value:g}", "nvfp4", x, 16, torch.tensor(amax_value))
        # The global scale is a power of two: blocks whose scale is each E4M3 number, or halfway between two.
        scales = _e4m3_values()
        scales = torch.cat([scales, (scales[1:] + scales[:-1]) / 2])
        heads = scales * 6.0
        bounds = torch.tensor(E2M1_BOUNDS) * scales[:, None]
        rows = [torch.cat([h[None], _neighbours(b, dtype).float(), -b]) for h, b in zip(heads, bounds, strict=True)]
        ties = torch.stack(rows)[:, :16].to(dtype)
        yield Case(f"nvfp4/{short}/scale_bounds", "nvfp4", ties, 16, torch.tensor(2688.0))
        yield Case(f"nvfp4/{short}/scale_bounds_small", "nvfp4", ties * 2.0**-6, 16, torch.tensor(2688.0 * 2.0**-6))
        broken = _normal(15, 4, 64)
        broken[0, 3], broken[1, 20], broken[2, :] = math.nan, -math.nan, math.nan
        yield Case(f"mxfp4/{short}/nan", "mxfp4", broken.to(dtype), 32, golden=False)
        yield Case(f"nvfp4/{short}/nan", "nvfp4", broken.to(dtype), 16, torch.tensor(3.0), golden=False)


def digest(case: Case) -> str:
    """Digest of a case's input, to tell a drifted recipe from a wrong result."""
    amax = b"" if case.amax is None else to_bits(case.amax.reshape(1)).tobytes()
    return hashlib.sha256(to_bits(case.x).tobytes() + amax).hexdigest()[:16]


def mismatches(expected: np.ndarray, ours: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Where two outputs, given as bits, differ; zeros and NaNs count as equal whatever their sign."""
    width = 32 if dtype == torch.float32 else 16
    magnitude = (1 << (width - 1)) - 1
    mantissa_bits, _, top = _layout(dtype)
    infinity = (top + 1) << mantissa_bits
    a, b = expected.astype(np.int64), ours.astype(np.int64)
    zeros = ((a & magnitude) == 0) & ((b & magnitude) == 0)
    nans = ((a & magnitude) > infinity) & ((b & magnitude) > infinity)
    return (a != b) & ~zeros & ~nans


def ours(case: Case, device: str) -> torch.Tensor:
    """``layerbits.candidates.fp4`` on one device."""
    from layerbits.candidates.fp4 import mxfp4, nvfp4

    x = case.x.to(device)
    return mxfp4(x, case.block_size) if case.amax is None else nvfp4(x, case.amax, case.block_size)


def kernel(case: Case) -> torch.Tensor:
    """ModelOpt's CUDA kernels, called as its quantizers call them."""
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    amax = None if case.amax is None else case.amax.cuda()
    scale_bits = (8, 0) if case.amax is None else (4, 3)
    return dynamic_block_quant(case.x.cuda(), case.block_size, amax, None, (2, 1), scale_bits)


def quantizer(case: Case, **extra: Any) -> torch.Tensor:
    """ModelOpt's ``TensorQuantizer`` with the weight settings of its own configs, on the GPU."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    config = mtq.MXFP4_DEFAULT_CFG if case.amax is None else mtq.W4A16_NVFP4_CFG
    weight = [e["cfg"] for e in config["quant_cfg"] if e["quantizer_name"] == "*weight_quantizer" and e.get("cfg")][-1]
    module = TensorQuantizer(QuantizerAttributeConfig(**weight, **extra)).cuda()
    if case.amax is not None:
        module.amax = case.amax.cuda()
    return module(case.x.cuda())


def _table_reciprocal(table: torch.Tensor) -> Any:
    """A stand-in for ``layerbits.candidates.fp4.device_reciprocal`` that looks the GPU's reciprocal up."""

    def reciprocal(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int32)
        exact = table.to(x.device)[(bits & 0x7FFFFF).long()] - ((bits >> 23) - 127 << 23)
        return torch.where((x > 1e-37) & (x < 1e37), exact.view(torch.float32), x.reciprocal())

    return reciprocal


def _report_division(folder: Path) -> torch.Tensor:
    """Prints and stores how the GPU divides; returns the table of reciprocals."""
    from gpu_division import divide, reciprocals

    from layerbits.candidates import fp4

    table = reciprocals()
    x = (torch.arange(2**23, dtype=torch.int32, device="cuda") + 0x3F800000).view(torch.float32)
    difference = table - (1.0 / x.double()).float().view(torch.int32)
    ours_differ = int((fp4.device_reciprocal(x).view(torch.int32) != table).sum())
    print(f"our model of the GPU's reciprocal differs from it in {ours_differ} of 2**23 mantissas")
    values, counts = difference.unique(return_counts=True)
    print(
        "GPU reciprocal minus correctly rounded one, in ulp:", dict(zip(values.tolist(), counts.tolist(), strict=True))
    )
    np.savez_compressed(
        folder / "rcp.npz",
        plus=np.packbits((difference > 0).cpu().numpy()),
        minus=np.packbits((difference < 0).cpu().numpy()),
    )
    generator = torch.Generator("cuda").manual_seed(0)
    reciprocal = _table_reciprocal(table)
    for low, high in ((127, 128), (67, 187), (2, 252)):
        bits = torch.randint(low << 23, high << 23, (2, 2**24), generator=generator, device="cuda", dtype=torch.int32)
        a, b = bits.view(torch.float32)
        if low == 2:
            a = torch.ones_like(a)
        different = (divide(a, b).view(torch.int32) != (a * reciprocal(b)).view(torch.int32)) & (b < 1e37) & (b > 1e-37)
        print(f"a / b is not a * reciprocal(b) [exponent fields {low} to {high}]: {int(different.sum())} of 2**24")
    sixth = divide(x.new_ones(1), x.new_full((1,), 6.0)).view(torch.int32)
    print(f"GPU reciprocal of 6: {int(sixth):#x} (correctly rounded: 0x3e2aaaab)")
    amax = x[:: 2**7]
    by_torch = amax / (6.0 * 448.0)
    print(
        "torch amax / 2688 on CUDA: differs from amax * (1 / 2688) in",
        int((by_torch != amax * (1.0 / 2688.0)).sum()),
        "and from the CPU's division in",
        int((by_torch.cpu() != amax.cpu() / 2688.0).sum()),
        "of",
        amax.numel(),
    )
    return table


def _hex(bits: Any, dtype: torch.dtype) -> str:
    return f"{int(bits):#0{10 if dtype == torch.float32 else 6}x}"


def _show(case: Case, expected: np.ndarray, got: np.ndarray, where: np.ndarray) -> None:
    """Prints the first mismatches with everything that led to them."""
    dtype, n = case.x.dtype, case.x.shape[-1]
    x_bits, x = to_bits(case.x).reshape(-1), case.x.float().reshape(-1)
    for i in np.flatnonzero(where)[:SHOWN_MISMATCHES]:
        start = i - i % n + (i % n) // case.block_size * case.block_size
        amax = x[start : min(start + case.block_size, i - i % n + n)].abs().max().reshape(1)
        kernel_bits, our_bits = expected.reshape(-1)[i : i + 1], got.reshape(-1)[i : i + 1]
        print(
            f"    [{i}] x {_hex(x_bits[i], dtype)} = {float(x[i]):.9g}",
            f"block amax {_hex(to_bits(amax)[0], torch.float32)} = {float(amax):.9g}",
            f"kernel {_hex(kernel_bits[0], dtype)} = {float(from_bits(kernel_bits, dtype)):.9g}",
            f"ours {_hex(our_bits[0], dtype)} = {float(from_bits(our_bits, dtype)):.9g}",
            "" if case.amax is None else f"global amax {float(case.amax):.9g}",
            sep=", ",
        )


def _compare(case: Case, expected: np.ndarray, table: torch.Tensor) -> int:
    """Prints one case's row; returns how many elements of ours differ on either device."""
    from layerbits.candidates import fp4

    counts = []
    first: tuple[np.ndarray, np.ndarray] | None = None
    own = fp4.device_reciprocal
    for device, reciprocal in (("cpu", own), ("cuda", own), ("cuda", _table_reciprocal(table))):
        fp4.device_reciprocal = reciprocal
        try:
            got = to_bits(ours(case, device))
        finally:
            fp4.device_reciprocal = own
        where = mismatches(expected, got, case.x.dtype)
        counts.append(int(where.sum()))
        if where.any() and first is None:
            first = (got, where)
    note = "" if case.golden else "  (reported only)"
    print(f"{case.name:40s} {case.x.numel():9d} {counts[0]:7d} {counts[1]:7d} {counts[2]:7d}{note}")
    if first is not None:
        _show(case, expected, *first)
    return counts[0] + counts[1] if case.golden else 0


def stress_cases() -> Iterator[Case]:
    """Larger tensors that are compared on the GPU and not stored."""
    for seed, (short, dtype) in enumerate(DTYPES.items()):
        weights = (_normal(100 + seed, 2048, 1024) * 0.02).to(dtype)
        grid = _grid(200 + seed, 2048, 1024)
        yield Case(f"mxfp4/{short}/stress_weights", "mxfp4", weights, 32)
        yield Case(f"mxfp4/{short}/stress_grid", "mxfp4", grid.to(dtype), 32)
        yield Case(f"nvfp4/{short}/stress_weights", "nvfp4", weights, 16, weights.float().abs().max())
        for amax in (72.0, 84.0, 90.0, 96.0, 97.0, 104.0, 108.0, 112.0, 120.0, 126.0):
            yield Case(f"nvfp4/{short}/stress_grid_{amax:g}", "nvfp4", grid.to(dtype), 16, torch.tensor(amax))


def _same(case: Case, expected: np.ndarray, label: str, **extra: Any) -> int:
    """Counts the elements in which a ``TensorQuantizer`` differs from the kernel called directly."""
    try:
        where = mismatches(expected, to_bits(quantizer(case, **extra)), case.x.dtype)
    except Exception as error:  # an infinite amax may be refused: said, not hidden
        print(f"{case.name}: {label} raised {type(error).__name__}: {error}")
        return 0
    if where.any():
        print(f"{case.name}: {label} differs from the kernel in {int(where.sum())} elements")
    return int(where.sum())


def main(folder: Path) -> None:
    """Runs everything on the GPU."""
    import modelopt
    import triton

    from layerbits.candidates.backends import register_backends
    from layerbits.candidates.fp4 import MXFP4_BACKEND, NVFP4_BACKEND, cuda_kernels_available

    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "modelopt": modelopt.__version__,
        "numpy": np.__version__,
    }
    print(versions, "cuda_kernels_available:", cuda_kernels_available())
    register_backends()
    table = _report_division(folder)
    print(f"{'case':40s} {'elements':>9s} {'cpu':>7s} {'cuda':>7s} {'cuda with the measured reciprocal':>7s}")
    arrays, digests, left, quantizers = {}, {}, 0, 0
    for case in cases():
        expected = to_bits(kernel(case))
        left += _compare(case, expected, table)
        if case.golden:
            arrays[case.name], digests[case.name] = expected, digest(case)
            if case.block_size == (32 if case.amax is None else 16):
                quantizers += _same(case, expected, "TensorQuantizer")
                backend = MXFP4_BACKEND if case.amax is None else NVFP4_BACKEND
                _same(case, expected, "TensorQuantizer with our backend", backend=backend)
    meta = np.frombuffer(json.dumps({"versions": versions, "digests": digests}).encode(), np.uint8)
    np.savez_compressed(folder / "fp4.npz", meta=meta, **arrays)
    for case in stress_cases():
        left += _compare(case, to_bits(kernel(case)), table)
    print(f"cuda_kernels_available after the build: {cuda_kernels_available()}")
    print(f"{len(arrays)} golden cases, {(folder / 'fp4.npz').stat().st_size / 1024:.0f} KiB")
    print(f"{left} elements of ours differ (NaN inputs aside);", end=" ")
    print(f"ModelOpt's quantizers differ from its kernels in {quantizers}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
