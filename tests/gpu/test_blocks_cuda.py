import pytest
import torch

from layerbits.candidates.fp4 import cuda_kernels_available
from tests.golden.make_blocks import DTYPES, KINDS, cases, kernel, ours, worse
from tests.golden.make_fp4 import mismatches, to_bits

pytestmark = pytest.mark.skipif(not cuda_kernels_available(), reason="ModelOpt's kernels need CUDA, nvcc and ninja")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_equals_the_kernels_bit_for_bit(kind, dtype, device):
    differing = {}
    for case in cases():
        if case.name.startswith(f"{kind}/{dtype}/"):
            where = mismatches(to_bits(kernel(case)), to_bits(ours(case, device)), case.x.dtype)
            if where.any():
                differing[case.name] = int(where.sum())
    assert differing == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sweep_finds_ranges_as_good_as_the_kernels(dtype, device):
    for case in cases():
        if case.name.startswith(f"nvfp4_sweep/{dtype}/"):
            mine, theirs = ours(case, device).cpu(), kernel(case).cpu()
            assert float((mine != theirs).float().mean()) < 1e-3, case.name
            assert worse(case, mine, theirs) < 1e-5, case.name


@pytest.mark.parametrize("shape", [(2, 37, 64), (3, 5, 80)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nvfp4_activations_equal_modelopts_quantizer(dtype, shape):
    """Dynamic NVFP4 of activations: three dimensions, a calibrated range below the largest value."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from layerbits.candidates.fp4 import nvfp4

    entries = mtq.NVFP4_DEFAULT_CFG["quant_cfg"]
    cfg = [e["cfg"] for e in entries if e["quantizer_name"] == "*input_quantizer" and e.get("cfg")][-1]
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**cfg)).cuda()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
    quantizer.amax = x.float().abs().max() * 0.7
    found, mine = quantizer(x), nvfp4(x.cpu(), quantizer.amax.cpu())
    assert not mismatches(to_bits(found), to_bits(mine), dtype).any()
