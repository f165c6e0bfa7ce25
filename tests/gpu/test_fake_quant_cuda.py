"""The kernels of fake quantization against ModelOpt's CUDA extensions, bit for bit."""

import pytest
import torch

from layerbits.scoring import fake_quant, quantizers
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from modelopt.torch.quantization.nn import TensorQuantizer

FOUND = quantizers.distinct_settings([support.search_config(c, "cuda") for c in support.distinct_candidates(cuda=True)])
SETTINGS = [s for s in (*FOUND.weights, *FOUND.inputs) if s is not None and fake_quant.has_kernel(s)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _name(setting):
    bits = "".join(map(str, setting.num_bits)) if isinstance(setting.num_bits, tuple) else setting.num_bits
    return f"{bits}-{setting.axis}-{setting.block_sizes}-{setting.type}".replace(" ", "")


def _tensor(shape, dtype):
    """Rows of sizes far apart, one of them zero, with numbers that lie between two steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * torch.logspace(-3, 2, shape[-2])[:, None]
    x[..., 1, :] = 0
    x[..., 2, :] = torch.linspace(-8, 8, 129).repeat(-(-shape[-1] // 129))[: shape[-1]]
    return x.to("cuda", dtype)


def _pair(setting, x, share):
    """ModelOpt's quantizer and ours, both with a share of the range of a tensor."""
    made = []
    for kind in (TensorQuantizer, fake_quant.quantizer_class()):
        quantizer = kind(setting).cuda()
        quantizers.calibrate_weight(quantizer, x)
        if quantizers.needs_range(quantizer):
            quantizer.amax = quantizer.amax * share
        made.append(quantizer)
    return made


@pytest.mark.parametrize("share", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(24, 256), (5, 5120), (2, 9, 384)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=_name)
def test_equals_modelopts_quantizer_bit_for_bit(setting, dtype, shape, share):
    x = _tensor(shape, dtype)
    theirs, ours = _pair(setting, x, share)
    assert torch.equal(ours(x), theirs(x))


def test_a_large_weight_equals_modelopts():
    x = torch.randn(4097, 9729, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.bfloat16)
    for setting in SETTINGS:
        blocks = {k for k, v in (setting.block_sizes or {}).items() if isinstance(k, int) and v is not None}
        if not blocks or setting.block_sizes.get("type") == "dynamic":
            theirs, ours = _pair(setting, x, 0.9)
            assert torch.equal(ours(x), theirs(x)), _name(setting)


def test_the_usual_formats_have_a_kernel():
    bits = {str(s.num_bits) for s in SETTINGS}
    assert {"(4, 3)", "8", "4", "(2, 1)"} <= bits


def test_a_gradient_goes_modelopts_way():
    setting = next(s for s in SETTINGS if s.num_bits == (4, 3))
    x = _tensor((24, 256), torch.float32)
    _, ours = _pair(setting, x, 0.5)
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert leaf.grad is not None


def test_a_nan_stays_one():
    for setting in SETTINGS:
        x = _tensor((24, 256), torch.bfloat16)
        _, ours = _pair(setting, x, 1.0)
        x[5, 7] = torch.nan
        assert bool(ours(x)[5, 7].isnan()), _name(setting)
