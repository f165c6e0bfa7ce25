"""Which quantizer settings have a kernel of ours; what the kernels compute is tested on a GPU."""

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from layerbits.scoring import fake_quant

MXFP4 = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
NVFP4 = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}


def setting(**attributes):
    return QuantizerAttributeConfig(**attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"num_bits": (4, 3)},
        {"num_bits": 8, "axis": 0},
        {"num_bits": 4, "block_sizes": {-1: 128}},
        {"num_bits": (2, 1), "block_sizes": MXFP4},
        {"num_bits": (2, 1), "block_sizes": MXFP4, "backend": "layerbits_mxfp4"},
    ],
)
def test_settings_with_a_kernel(attributes):
    assert fake_quant.has_kernel(setting(**attributes))
    assert fake_quant.has_kernel(TensorQuantizer(setting(**attributes)))


@pytest.mark.parametrize(
    "attributes",
    [
        {"num_bits": (2, 1), "block_sizes": NVFP4},
        {"num_bits": (4, 3), "block_sizes": MXFP4},
        {"num_bits": 8, "unsigned": True},
        {"num_bits": 8, "backend": "another"},
        {"num_bits": 8, "bias": {-1: None}},
    ],
)
def test_settings_that_are_left_to_modelopt(attributes):
    assert not fake_quant.has_kernel(setting(**attributes))


def test_on_a_cpu_it_is_modelopts_quantizer():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    made = [kind(setting(num_bits=8, axis=0)) for kind in (TensorQuantizer, fake_quant.quantizer_class())]
    for quantizer in made:
        quantizer.amax = x.abs().amax(1, keepdim=True)
    assert torch.equal(made[1](x), made[0](x))
