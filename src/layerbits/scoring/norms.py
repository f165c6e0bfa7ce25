"""RMS norms in one kernel: Hugging Face models spell them out in half a dozen, which a GPU feels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerbits.scoring.patches import Forward, forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def fused_norms(model: PreTrainedModel) -> Iterator[None]:
    """On a GPU, RMS norms whose output it reproduces run as PyTorch's fused kernel; others stay as they are."""
    fused: dict[nn.Module, Forward] = {}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and module.weight.is_cuda:
            forward = _fused(module)
            if _same(module, forward):
                fused[module] = forward
    with forwards(fused):
        yield


def _fused(module: nn.Module) -> Forward:
    weight = module.get_parameter("weight").detach()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return weight * torch.nn.functional.rms_norm(x, weight.shape, None, eps)  # rounds twice, as the original does

    return forward


def _same(module: nn.Module, forward: Forward) -> bool:
    weight = module.get_parameter("weight")
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn((16, *weight.shape), generator=generator, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        expected, got = module(x), forward(x)
    one_unit = torch.finfo(weight.dtype).eps
    return expected.dtype == got.dtype and bool(torch.allclose(got, expected, rtol=2 * one_unit, atol=one_unit**2))
