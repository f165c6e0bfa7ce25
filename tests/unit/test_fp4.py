import copy
import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from layerbits.candidates import fp4
from layerbits.candidates.backends import register_backends, with_reference_backend
from layerbits.candidates.fp4 import MXFP4_BACKEND, NVFP4_BACKEND, mxfp4, nvfp4
from layerbits.errors import UserError
from tests.golden.make_fp4 import DTYPES, cases, digest, from_bits, mismatches, ours, to_bits

GOLDEN = Path(__file__).parents[1] / "golden" / "fp4.npz"
GPU_RECIPROCALS = "c408381446132e07fa5581e930dc33fb790bea7ec4276ef3621e322df2492a55"
"""SHA-256 of an H200's reciprocals of all FP32 numbers from 1 to 2, as little-endian 32-bit integers."""
KERNEL_TIES = (
    ("fp32", 0x3CA13C29, 0x3D0D31EB, 0.0787280276, 0x3CB844C2),
    ("fp32", 0x41800000, 0x42680000, 96, 0x41924925),
    ("fp32", 0xC1800000, 0x42580000, 96, 0xC1924925),
    ("fp32", 0xC2AE0000, 0x42B40000, 120, 0xC2BC9249),
    ("fp32", 0xC2480000, 0x42B40000, 120, 0xC23C9249),
    ("fp32", 0x424C0000, 0x42B40000, 120, 0x423C9249),
    ("fp16", 0x4F00, 0x42B40000, 120, 0x4FDB),
    ("fp16", 0x54F0, 0x42B40000, 120, 0x55E5),
    ("fp16", 0x4980, 0x42B40000, 120, 0x47DB),
    ("bf16", 0x4290, 0x42B40000, 120, 0x427B),
    ("bf16", 0xC1E8, 0x42B40000, 120, 0xC1FB),
    ("bf16", 0xC26C, 0x42B40000, 120, 0xC27B),
)
"""Dtype, bits of a number, FP32 bits of its block's amax, global amax, bits of the kernel's result on an H200: ties
between two E2M1 values that a correctly rounded reciprocal would send the other way."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
NV_BLOCK = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest(value: float, scale: float) -> float:
    """Nearest E2M1 multiple of the scale by search; of two equally near ones that with an even mantissa."""
    index = min(range(8), key=lambda i: (abs(abs(value) - E2M1[i] * scale), i % 2))
    return math.copysign(E2M1[index] * scale, value)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_file_holds_every_case_of_unchanged_input(golden):
    wanted = {case.name: digest(case) for case in cases() if case.golden}
    assert json.loads(golden["meta"].tobytes())["digests"] == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_equals_the_cuda_kernels_bit_for_bit(golden, kind, dtype):
    differing = {}
    for case in cases():
        if case.golden and case.name.startswith(f"{kind}/{dtype}/"):
            where = mismatches(golden[case.name], to_bits(ours(case, "cpu")), case.x.dtype)
            if where.any():
                differing[case.name] = int(where.sum())
    assert differing == {}


def test_reciprocal_is_the_gpus_for_every_mantissa():
    digest = hashlib.sha256()
    for start in range(0, 2**23, 2**20):
        x = (torch.arange(start, start + 2**20, dtype=torch.int32) + 0x3F800000).view(torch.float32)
        digest.update(fp4.device_reciprocal(x).view(torch.int32).numpy().astype("<i4").tobytes())
    assert digest.hexdigest() == GPU_RECIPROCALS


@pytest.mark.parametrize("exponent", [-126, -17, 5, 125])
def test_reciprocal_scales_with_the_exponent(exponent):
    x = 1.0 + torch.arange(0, 2**23, 999) / 2**23
    expected = fp4.device_reciprocal(x).double() * 2.0**-exponent
    assert torch.equal(fp4.device_reciprocal(x * 2.0**exponent).double(), expected)


def test_reciprocal_at_the_ends_of_the_range():
    x = torch.tensor([0.0, 2.0**-127, 2.0**-126, 2.0**126, 2.0**127, math.inf])
    assert fp4.device_reciprocal(x).tolist() == [math.inf, 2.0**127, 2.0**126, 2.0**-126, 2.0**-127, 0.0]


@pytest.mark.parametrize(("dtype", "x", "block_amax", "global_amax", "kernel"), KERNEL_TIES)
def test_ties_fall_as_the_gpus_reciprocal_makes_them(dtype, x, block_amax, global_amax, kernel):
    block = torch.zeros(16, dtype=DTYPES[dtype])
    block[0] = from_bits(np.array([block_amax]), torch.float32)
    block[1] = from_bits(np.array([x]), DTYPES[dtype])
    assert to_bits(nvfp4(block, torch.tensor(global_amax)))[1] == kernel


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mxfp4_is_the_nearest_value_on_the_block_grid(dtype):
    x = random(16, 64, seed=1, dtype=dtype)
    expected = torch.empty_like(x)
    for row, start in np.ndindex(16, 2):
        block = x[row, 32 * start : 32 * start + 32].double()
        scale = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 6))
        expected[row, 32 * start : 32 * start + 32] = torch.tensor([nearest(float(v), scale) for v in block])
    assert torch.equal(mxfp4(x), expected)


def test_nvfp4_is_the_nearest_value_on_the_block_grid():
    # 2688 makes the global scale 1; multiples of 1/8 hit the bounds between two values often.
    x = (random(64, 32, seed=2) * 24).round() / 8
    expected = torch.empty_like(x)
    for row, start in np.ndindex(64, 2):
        block = x[row, 16 * start : 16 * start + 16]
        scale = float((block.abs().max() / 6).to(torch.float8_e4m3fn))
        expected[row, 16 * start : 16 * start + 16] = torch.tensor([nearest(float(v), scale) for v in block])
    assert torch.equal(nvfp4(x, torch.tensor(2688.0)), expected)


def test_bounds_go_to_the_even_mantissa():
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(mxfp4(torch.cat([bounds, -bounds])), torch.cat([expected, -expected]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantizing_again_changes_nothing(dtype):
    x = random(32, 96, seed=3, dtype=dtype)
    amax = x.abs().max()
    for once, twice in (
        (mxfp4(x), mxfp4(mxfp4(x))),
        (nvfp4(x, amax), nvfp4(nvfp4(x, amax), amax)),
    ):
        assert torch.equal(once, twice)
        assert not torch.equal(once, x)


@pytest.mark.parametrize("n", [1, 17, 33, 48])
def test_a_short_last_block_is_as_if_padded_with_zeros(n):
    x = random(3, n, seed=4)
    padded = torch.nn.functional.pad(x, (0, 64 - n))
    amax = x.abs().max()
    assert torch.equal(mxfp4(x), mxfp4(padded)[:, :n])
    assert torch.equal(nvfp4(x, amax), nvfp4(padded, amax)[:, :n])


def test_any_number_of_dimensions_and_strides():
    x = random(6, 64, seed=5)
    amax = x.abs().max()
    for quantize in (mxfp4, lambda t: nvfp4(t, amax)):
        flat = quantize(x)
        assert torch.equal(quantize(x.view(2, 3, 64)), flat.view(2, 3, 64))
        assert torch.equal(quantize(x[2]), flat[2])
        assert torch.equal(quantize(x.T.contiguous().T), flat)
        assert quantize(x[:0]).shape == (0, 64)


def test_input_is_left_as_it_was():
    x = random(4, 64, seed=6)
    before = x.clone()
    mxfp4(x)
    nvfp4(x, x.abs().max())
    assert torch.equal(x, before)


def test_nan_stays_nan_in_its_block_alone():
    x = random(2, 64, seed=7)
    clean = x.clone()
    x[1, 40] = torch.nan
    for quantize, size in ((mxfp4, 32), (lambda t: nvfp4(t, torch.tensor(3.0)), 16)):
        out = quantize(x)
        start = 40 // size * size
        assert out[1, start : start + size].isnan().all()
        out[1, start : start + size] = quantize(clean)[1, start : start + size]
        assert torch.equal(out, quantize(clean))


def test_a_nan_amax_is_seen_in_nvfp4():
    assert nvfp4(torch.ones(1, 16), torch.tensor(torch.nan)).isnan().all()


def test_of_several_global_amaxes_the_largest_counts():
    x = random(4, 32, seed=8)
    assert torch.equal(nvfp4(x, torch.tensor([[1.0], [3.0]])), nvfp4(x, torch.tensor(3.0)))


def test_gradient_passes_straight_through():
    x = random(2, 32, seed=9).requires_grad_()
    upstream = random(2, 32, seed=10)
    for out in (mxfp4(x), nvfp4(x, torch.tensor(0.5))):
        (grad,) = torch.autograd.grad(out, x, upstream)
        assert torch.equal(grad, upstream)


def test_clipped_gradient_is_zero_beyond_the_global_amax():
    x = torch.tensor([[0.2, -0.5, 0.6, -3.0]], requires_grad=True)
    out = nvfp4(x, torch.tensor(0.5), pass_through_bwd=False)
    (grad,) = torch.autograd.grad(out, x, torch.full((1, 4), 2.0))
    assert grad.tolist() == [[2.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mxfp4(torch.ones(32, dtype=torch.float64)), "float64"),
        (lambda: nvfp4(torch.tensor(1.0), torch.tensor(1.0)), "dimension"),
        (lambda: mxfp4(torch.ones(64), block_size=64), "block size 64"),
        (lambda: nvfp4(torch.ones(32), torch.tensor(1.0), block_size=32), "block size 32"),
    ],
)
def test_refuses_what_the_kernels_do_not_take(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_enabled_fp4_quantizers_get_the_backend_and_nothing_else_changes():
    fp8 = {"num_bits": (4, 3), "axis": None}
    listed = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": MX_BLOCK},
            {"quantizer_name": "*input_quantizer", "cfg": [listed, fp8]},
            {"quantizer_name": "*k_bmm_quantizer", "cfg": {**MX_BLOCK, "enable": False}},
            {"quantizer_name": "*lm_head*", "enable": False, "cfg": NV_BLOCK},
        ],
        "algorithm": "max",
    }
    before = copy.deepcopy(config)
    changed = with_reference_backend(config)
    assert config == before
    expected = copy.deepcopy(before)
    expected["quant_cfg"][1]["cfg"]["backend"] = MXFP4_BACKEND
    expected["quant_cfg"][2]["cfg"][0]["backend"] = NVFP4_BACKEND
    assert changed == expected


def test_stored_block_ranges_name_no_backend():
    static = {**NV_BLOCK, "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
    config = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": static}]}
    assert with_reference_backend(config) == config


def test_registering_twice_overwrites_nothing():
    register_backends()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_backends()


@pytest.mark.parametrize("preset", ["MXFP4_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG", "W4A16_NVFP4_CFG", "NVFP4_DEFAULT_CFG"])
def test_modelopt_quantizes_a_linear_with_the_backend(preset):
    import modelopt.torch.quantization as mtq

    register_backends()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 8, bias=False))
    weight = model[0].weight.detach().clone()
    batch = random(4, 48, seed=11)
    model = mtq.quantize(model, with_reference_backend(getattr(mtq, preset)), lambda m: m(batch))
    linear = model[0]
    expected = mxfp4(weight) if "MXFP4" in preset else nvfp4(weight, weight.abs().max())
    assert torch.equal(linear.weight_quantizer(linear.weight), expected)
    if preset == "NVFP4_DEFAULT_CFG":
        batch = nvfp4(batch, batch.abs().max())
    elif preset == "MXFP4_DEFAULT_CFG":
        batch = mxfp4(batch)
    if preset != "W4A8_MXFP4_FP8_CFG":
        assert torch.equal(model(random(4, 48, seed=11)), torch.nn.functional.linear(batch, expected))


@pytest.fixture
def gpu_machine(monkeypatch):
    """A machine that has a GPU and the whole toolchain, as far as ``cuda_kernels_available`` looks."""
    from modelopt.torch.quantization.extensions import get_cuda_ext_mx
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/opt/cuda")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(fp4.shutil, "which", lambda name: name)
    monkeypatch.delattr(get_cuda_ext_mx, "extension", raising=False)
    return monkeypatch


def test_kernels_are_available_with_gpu_and_toolchain(gpu_machine):
    assert fp4.cuda_kernels_available()


@pytest.mark.parametrize("missing", ["gpu", "cuda build", "toolkit", "nvcc", "ninja", "compiler"])
def test_kernels_are_not_available_if_anything_lacks(gpu_machine, missing):
    from torch.utils import cpp_extension

    gpu_machine.setenv("CXX", "the-compiler")
    change = {
        "gpu": (torch.cuda, "is_available", lambda: False),
        "cuda build": (torch.version, "cuda", None),
        "toolkit": (cpp_extension, "CUDA_HOME", None),
        "nvcc": (fp4.shutil, "which", lambda name: None if name == "/opt/cuda/bin/nvcc" else name),
        "ninja": (cpp_extension, "is_ninja_available", lambda: False),
        "compiler": (fp4.shutil, "which", lambda name: None if name == "the-compiler" else name),
    }[missing]
    gpu_machine.setattr(*change)
    assert not fp4.cuda_kernels_available()


def test_a_build_of_this_process_settles_availability(gpu_machine):
    from modelopt.torch.quantization.extensions import get_cuda_ext_mx

    gpu_machine.setattr(get_cuda_ext_mx, "extension", None, raising=False)
    assert not fp4.cuda_kernels_available()
    gpu_machine.setattr(get_cuda_ext_mx, "extension", object())
    assert fp4.cuda_kernels_available()
