"""MXFP8 against ModelOpt's CPU code, NVFP4 with stored block ranges against its interpreted kernels, and searches."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import MXFP8QTensor

from layerbits.candidates import backends, nvfp4_static
from layerbits.candidates.algorithms import Ranges, ranges_of
from layerbits.candidates.mxfp8 import mxfp8
from layerbits.scoring import quantizers
from tests.golden.make_blocks import DTYPES, KINDS, apart, cases, digest, ours, ours_float32, worse
from tests.golden.make_fp4 import from_bits, mismatches, to_bits

GOLDEN = Path(__file__).parents[1] / "golden" / "blocks.npz"
TIES = {"nvfp4_four_over_six/bf16/normal_0.02_wide": 1, "nvfp4_four_over_six/bf16/falling_wide": 1}
"""Blocks of which a value, or the scale, lies just between two numbers, so that a reciprocal decides otherwise."""
E4M3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def test_golden_file_holds_every_case_of_unchanged_input(golden):
    wanted = {case.name: digest(case) for case in cases() if case.golden and case.kind != "mxfp8"}
    assert json.loads(golden["meta"].tobytes())["digests"] == wanted


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nvfp4_is_what_modelopts_interpreted_kernels_compute(golden, kind):
    """To a few units in the last place: the interpreter divides where a GPU multiplies with a reciprocal."""
    differing, seen = {}, 0
    for case in cases():
        if case.golden and case.kind == kind:
            theirs = from_bits(golden[case.name], torch.float32)
            units = apart(theirs.reshape(len(case.x), -1), ours_float32(case).reshape(len(case.x), -1))
            seen += 1
            if blocks := int((units > 4).any(-1).sum()):
                differing[case.name] = blocks
    assert seen >= 15
    assert differing == {name: blocks for name, blocks in TIES.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8_equals_modelopts_tensor_bit_for_bit(dtype):
    """But for blocks whose scale is a subnormal number, which the kernel takes for zero."""
    differing, blocks = {}, 0
    for case in cases():
        if case.kind == "mxfp8" and case.block_size == 32 and case.name.startswith(f"mxfp8/{dtype}/"):
            stored, scale = MXFP8QTensor.quantize(case.x)
            width = -(-case.x.shape[-1] // 32) * 32
            padded = torch.nn.functional.pad(case.x.float(), (0, width - case.x.shape[-1]))
            amax = padded.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            counted = ~((amax > 0) & (amax / 448 < torch.finfo(torch.float32).tiny))
            keep = counted.expand(*counted.shape[:-1], 32).flatten(-2)[..., : case.x.shape[-1]]
            blocks += int(counted.sum())
            where = mismatches(to_bits(stored.dequantize(scale=scale)[keep]), to_bits(ours(case)[keep]), case.x.dtype)
            if where.any():
                differing[case.name] = int(where.sum())
    assert blocks > 500
    assert differing == {}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mxfp8_is_the_nearest_value_on_the_block_grid(dtype):
    x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    expected = torch.empty_like(x)
    for row, start in np.ndindex(8, 2):
        block = x[row, 32 * start : 32 * start + 32].double()
        scale = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 448))
        odd = torch.arange(127) % 2 * 1e-9  # of two equally near ones the even mantissa
        at = ((block.abs()[:, None] / scale - E4M3).abs() + odd).min(dim=1).indices
        expected[row, 32 * start : 32 * start + 32] = (E4M3[at] * scale).copysign(block).to(dtype)
    assert torch.equal(mxfp8(x), expected)


def test_mxfp8_keeps_a_nan_visible():
    x = torch.ones(1, 64)
    x[0, 3] = math.nan
    assert mxfp8(x).isnan().tolist() == [[True] * 32 + [False] * 32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep_is_the_best_of_all_scales(dtype):
    for case in cases():
        if case.name.startswith(f"nvfp4_sweep/{dtype}/") and case.golden:
            scales = E4M3[1:].float() / 448
            errors = []
            for scale in scales:
                amax = (case.global_amax * scale).expand(len(case.x))
                values = nvfp4_static.nvfp4_static(case.x.float(), amax, case.global_amax)
                errors.append((values - case.x.float()).double().square().sum(-1))
            best = case.global_amax * scales[torch.stack(errors).argmin(0)]
            assert worse(case, ours(case), best) < 1e-6, case.name


def test_modelopt_computes_stored_block_ranges_without_a_gpu():
    backends.register_backends()
    cfg = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
    found = quantizers.distinct_settings(
        [{"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": cfg}], "algorithm": "max"}]
    )
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    quantizer = quantizers.make_quantizer(found.weights[0], "cpu")
    assert isinstance(quantizer, TensorQuantizer)
    quantizers.calibrate_weight(quantizer, weight)
    own = nvfp4_static.nvfp4_static(
        weight.reshape(-1, 16), weight.reshape(-1, 16).abs().amax(-1), weight.abs().amax()
    ).reshape(32, 64)
    assert torch.equal(quantizer(weight), own)


def test_fused_weights_share_a_range():
    weights = {f"model.layers.0.self_attn.{n}_proj": torch.full((2, 2), float(i)) for i, n in enumerate("qkvo", 1)}
    assert [float(v) for v in quantizers.shared_largest(weights.items()).values()] == [3.0, 3.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("algorithm", "found"),
    [
        (None, Ranges()),
        ("max", Ranges()),
        ({"method": "max", "layerwise": {"enable": False}}, Ranges()),
        ({"method": "max", "layerwise": {"enable": True}}, None),
        ("awq_lite", None),
        ({"method": "smoothquant", "alpha": 0.5}, None),
        (["max", "awq_lite"], None),
    ],
)
def test_which_algorithms_one_pass_can_calibrate(algorithm, found):
    assert ranges_of(algorithm) == found


def test_settings_of_the_searches():
    sweep = ranges_of({"method": "mse", "fp8_scale_sweep": True})
    assert sweep.weights["fp8_scale_sweep"]
    assert sweep.weights["step_size"] == 0.1
    both = ranges_of({"method": "nvfp4_act_headroom", "rho": 100.0, "weight_scale_algorithm": {"method": "mse"}})
    assert both.inputs == {"anchor_percentile": 1.0, "upper_percentile": 99.99, "rho": 100.0}
    assert both.weights["stop_multiplier"] == 4.0
