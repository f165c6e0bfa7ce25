import pytest
import torch

from layerbits.candidates import fp4
from layerbits.candidates.backends import register_backends, with_reference_backend
from layerbits.candidates.fp4 import cuda_kernels_available, mxfp4, nvfp4
from tests.golden.make_fp4 import DTYPES, cases, kernel, mismatches, ours, stress_cases, to_bits

pytestmark = pytest.mark.skipif(not cuda_kernels_available(), reason="ModelOpt's FP4 kernels need CUDA, nvcc and ninja")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_every_golden_input_equals_the_kernels(kind, dtype, device):
    differing = {}
    for case in cases():
        if case.golden and case.name.startswith(f"{kind}/{dtype}/"):
            where = mismatches(to_bits(kernel(case)), to_bits(ours(case, device)), case.x.dtype)
            if where.any():
                differing[case.name] = int(where.sum())
    assert differing == {}


def test_larger_inputs_equal_the_kernels():
    differing = {}
    for case in stress_cases():
        where = mismatches(to_bits(kernel(case)), to_bits(ours(case, "cuda")), case.x.dtype)
        if where.any():
            differing[case.name] = int(where.sum())
    assert differing == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reciprocal_is_the_gpus_for_every_mantissa(device):
    from tests.golden.gpu_division import reciprocals

    x = (torch.arange(2**23, dtype=torch.int32, device=device) + 0x3F800000).view(torch.float32)
    assert torch.equal(fp4.device_reciprocal(x).view(torch.int32), reciprocals().to(device))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("preset", ["MXFP4_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_quantized_linear_is_the_same_with_either_backend(preset, dtype):
    import modelopt.torch.quantization as mtq

    register_backends()
    batch = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    outputs = []
    for config in (getattr(mtq, preset), with_reference_backend(getattr(mtq, preset))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False)).to("cuda", dtype)
        model = mtq.quantize(model, config, lambda m: m(batch))
        outputs.append((model[0].weight_quantizer(model[0].weight), model[0].input_quantizer(batch)))
    for by_kernel, by_ours in zip(*outputs, strict=True):
        assert not mismatches(to_bits(by_kernel.detach()), to_bits(by_ours.detach()), dtype).any()


def test_cpu_and_cuda_tensors_give_the_same():
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    amax = x.abs().max()
    assert not mismatches(to_bits(mxfp4(x)), to_bits(mxfp4(x.cuda())), x.dtype).any()
    assert not mismatches(to_bits(nvfp4(x, amax)), to_bits(nvfp4(x.cuda(), amax)), x.dtype).any()
