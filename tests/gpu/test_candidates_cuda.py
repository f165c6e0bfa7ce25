"""Every cell of the grid on ModelOpt's CUDA kernels: it runs, on any shape of batch, and computes what the CPU does."""

import copy
import json

import pytest
import torch
from torch import nn

from layerbits.candidates.backends import register_backends, with_reference_backend
from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import FP4_VARIANTS, plain
from layerbits.candidates.fp4 import cuda_kernels_available
from layerbits.candidates.granularity import register_backend
from layerbits.candidates.linear import FP4, WEIGHT
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.errors import Unsupported

HERE = cuda_kernels_available()
pytestmark = pytest.mark.skipif(not HERE, reason="ModelOpt's kernels need CUDA, nvcc and ninja")

SHAPES = ((2, 7, 256), (1, 5, 256), (3, 1, 256), (1, 1, 256))
"""The kernels tell batches of one from others, and one token from several."""


def _split():
    """Distinct candidates that a GPU runs, and those that are refused because it does not."""
    runs, refused = {}, {}
    for pair in load_pairs():
        for fp4 in FP4_VARIANTS if pair.weight == "fp4" else ("mxfp4",):
            for overlay in load_overlays():
                made = resolve_candidate(pair, overlay, fp4, experimental=True)
                name = f"{made.info.name}-{fp4}" if pair.weight == "fp4" else made.info.name
                try:
                    check(made, {}, cuda=True)
                except Unsupported as reason:
                    if "mislabelled" not in str(reason):  # NVFP4 with other blocks runs, as a test below shows
                        refused.setdefault(made.info.config_hash, (name, made))
                else:
                    runs.setdefault(made.info.config_hash, (name, made))
    return dict(runs.values()), dict(refused.values())


RUNS, REFUSED = _split() if HERE else ({}, {})


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 64)).to(dtype)


def batches(device, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def quantize(made, device, dtype):
    import modelopt.torch.quantization as mtq

    config = made.search_config()
    del config["effective_bits"]
    calibration = batches(device, dtype)[0]
    return mtq.quantize(model(dtype).to(device), config, lambda m: m(calibration))


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_cell_runs_forward_and_backward_on_any_shape(name):
    base, quantized = model(torch.bfloat16).cuda(), quantize(RUNS[name], "cuda", torch.bfloat16)
    for x in batches("cuda", torch.bfloat16):
        x.requires_grad_()
        y = quantized(x)
        assert y.shape == (*x.shape[:2], 64)
        assert torch.isfinite(y).all()
        assert not torch.equal(y, base(x))
        y.float().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.any()


def _settings():
    """Distinct quantizer settings that the CPU computes too, with ModelOpt's own code, our token groups or MXFP8."""
    found = {}
    for name, made in RUNS.items():
        for quantizer, cfg in made.format.linear.cfgs.items():
            if cfg is not None and cfg.get("num_bits") != FP4:
                found.setdefault(
                    json.dumps(plain([quantizer, cfg]), sort_keys=True), (f"{quantizer}-{name}", quantizer, cfg)
                )
    return [pytest.param(quantizer, cfg, id=name) for name, quantizer, cfg in found.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("quantizer", "cfg"), _settings())
def test_the_gpu_computes_what_the_cpu_does(quantizer, cfg, dtype):
    import modelopt.torch.quantization as mtq

    register_backend()
    register_backends()
    entries = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": f"*{quantizer}", "cfg": cfg}]
    layers = {}
    for device in ("cpu", "cuda"):
        calibration = batches(device, dtype)[0]
        config = copy.deepcopy({"quant_cfg": entries, "algorithm": "max"})
        if device == "cpu":  # ModelOpt gives its CUDA kernel for MXFP8 the CPU's addresses
            config = with_reference_backend(config)
        layers[device] = mtq.quantize(model(dtype).to(device), config, lambda m, x=calibration: m(x))[0]
    for x in batches("cpu", dtype):
        values = layers["cpu"].weight.detach() if quantizer == WEIGHT else x
        on_cpu = getattr(layers["cpu"], quantizer)(values)
        on_gpu = getattr(layers["cuda"], quantizer)(values.cuda()).cpu()
        # The kernels multiply by a reciprocal where the CPU divides: a last bit of the result, and a step for a tie.
        off = ~torch.isclose(on_cpu, on_gpu, rtol=4 * torch.finfo(dtype).eps, atol=0)
        assert off.float().mean() <= 1e-2, (x.shape, off.float().mean(), (on_cpu - on_gpu).abs().max())


def test_modelopt_computes_nvfp4_blocks_of_16_whatever_the_format_says():
    """Why other NVFP4 blocks are refused."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the Triton kernel needs compute capability 8.9")
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(2)).cuda()
    outputs = []
    for size in (16, 32):
        blocks = {-1: size, "type": "dynamic", "scale_bits": (4, 3)}
        outputs.append(TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks))(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_cell_does_fail(name):
    with pytest.raises(Exception):  # noqa: B017, PT011 - what ModelOpt raises has many types
        quantize(REFUSED[name], "cuda", torch.bfloat16)(batches("cuda", torch.bfloat16)[0])
