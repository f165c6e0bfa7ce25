"""What ModelOpt quantizes in a model, and how each such module computes with weights that are not its own.

Three layouts of weights are known: linears (``[out, in]``, and classes that compute the same), GPT-2's ``Conv1D``, a
linear that stores its weight transposed and that ModelOpt quantizes as ``[out, in]``, and convolutions over the tokens
(``[out, in / groups, width]``, tokens last), as in state-space mixers.
"""

from __future__ import annotations

from functools import cache
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from layerbits.inputs.residence import resident

QuantizableModule = nn.Linear | _ConvNd
"""What ModelOpt's search decides on by itself; other classes of linears (GPT-2's) have the same attributes."""


def is_quantizable(module: nn.Module) -> TypeGuard[QuantizableModule]:
    """Whether ModelOpt's search decides on this module by itself: a linear or a convolution, by its own registry."""
    kind: type = type(module)
    return _is_quantizable(kind)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_convolution(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether it is a convolution, whose inputs and outputs have their tokens last."""
    return isinstance(module, _ConvNd)


def weight_of(module: QuantizableModule) -> torch.Tensor:
    """The weight as ModelOpt's quantizers see it, outputs first, where the module computes."""
    weight = resident(module).weight
    return weight.T.contiguous() if is_transposed(module) else weight


def shape_of(module: QuantizableModule) -> tuple[int, int]:
    """``(out_features, in_features)``; of a convolution its output channels and its width.

    These are the lengths that blocks of scales have to divide.
    """
    rows, *_, columns = reversed(module.weight.shape) if is_transposed(module) else module.weight.shape
    return int(rows), int(columns)


def tokens_of(module: nn.Module, x: torch.Tensor) -> int:
    """Number of tokens in an input of a module."""
    return int(x.numel() // x.shape[1 if is_convolution(module) else -1])


def outputs_of(module: QuantizableModule, x: torch.Tensor, weights: torch.Tensor, many: int) -> torch.Tensor:
    """What a module makes of an input with several weights.

    Args:
        module: A linear or a convolution; its bias is used.
        x: Its input.
        weights: Weights under each other, each as :func:`weight_of` gives it.
        many: How many.

    Returns:
        Their outputs side by side, features last: ``[..., many * out_features]``.
    """
    if is_convolution(module):
        parts = [run(module, x, weight) for weight in weights.chunk(many)]
        return features_last(module, torch.cat(parts, dim=1))
    bias = None if module.bias is None else module.bias.repeat(many)
    return torch.nn.functional.linear(x, weights, bias)


def features_last(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """An output (or its gradient) as ``[..., out_features]``."""
    return y.movedim(1, -1) if is_convolution(module) else y


def by_token(module: nn.Module, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values per position of an output, as values per token of the input.

    A causal convolution puts out more positions than it gets tokens; those after the last token are counted to it.

    Args:
        module: The module.
        values: ``[n, positions]``.
        x: Its input.
    """
    if not is_convolution(module):
        return values
    length = x.shape[-1]
    values = values.unflatten(1, (len(x), -1))
    tokens = values[..., :length].clone()
    tokens[..., -1] += values[..., length:].sum(dim=-1)
    return tokens.flatten(1)


def run(module: QuantizableModule, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A module's output in its own layout, with another weight in place of its own."""
    if is_convolution(module):
        return module._conv_forward(x, weight, module.bias)
    return torch.nn.functional.linear(x, weight, module.bias)


@cache
def _is_quantizable(kind: type) -> bool:
    import modelopt.torch.quantization.plugins.huggingface  # noqa: F401 - registers the classes of transformers
    from modelopt.torch.quantization.nn import QuantLinearConvBase, QuantModuleRegistry

    if issubclass(kind, QuantLinearConvBase):
        return True
    registered = QuantModuleRegistry.get(kind)
    return registered is not None and issubclass(registered, QuantLinearConvBase)
