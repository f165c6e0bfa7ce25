"""Operators for FP8 activations that vLLM's CPU build (0.32) lacks or only declares, in plain PyTorch.

A plugin of vLLM (``vllm.general_plugins``) for the tests alone: ``vllm.plugin=tests/serving/vllm_plugin`` puts this
folder on the server's path, where vLLM finds it. An operator that a build has is left alone.
"""

import torch


def register() -> None:
    """Puts a function in the place of each operator that is missing, or has no arguments: then it is only declared."""
    import vllm._custom_ops  # noqa: F401  (loads the operators that there are)

    for function in (static_scaled_fp8_quant, silu_and_mul_quant):
        declared = getattr(torch.ops._C, function.__name__, None)
        if declared is None or not declared.default._schema.arguments:
            function.default = getattr(declared, "default", None)  # named by compilation passes; eager mode has none
            setattr(torch.ops._C, function.__name__, function)


def static_scaled_fp8_quant(result, input, scale, group_shape=None):
    """``input / scale`` in E4M3, clipped to its range; ``scale`` is one number, or one per row."""
    limit = torch.finfo(result.dtype).max
    result.copy_((input.float() / _spread(scale.float(), input)).clamp(-limit, limit))


def silu_and_mul_quant(result, input, scale):
    """``silu(first half) * second half``, rounded to the input's dtype as the separate operators do, then as above."""
    gate, up = input.float().chunk(2, dim=-1)
    static_scaled_fp8_quant(result, (torch.nn.functional.silu(gate) * up).to(input.dtype), scale)


def _spread(scale, input):
    return scale if scale.numel() == 1 else scale.reshape(*scale.shape, *[1] * (input.dim() - scale.dim()))
