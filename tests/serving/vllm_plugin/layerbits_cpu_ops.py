"""What vLLM's CPU build (0.32) lacks for FP8 activations, in plain PyTorch: operators, and the rounding itself.

A plugin of vLLM (``vllm.general_plugins``) for the tests alone: ``vllm.plugin=tests/serving/vllm_plugin`` puts this
folder on the server's path, where vLLM finds it. An operator that a build has is left alone.
"""

import torch


def register() -> None:
    """Puts a function in the place of each operator that is missing, or has no arguments: then it is only declared."""
    import vllm._custom_ops  # noqa: F401  (loads the operators that there are)

    if torch.cpu._is_amx_tile_supported():  # its INT4 kernel takes AMX for granted, and dies where nobody asked for it
        torch.cpu._init_amx()
    for function in (static_scaled_fp8_quant, silu_and_mul_quant):
        declared = getattr(torch.ops._C, function.__name__, None)
        if declared is None or not declared.default._schema.arguments:
            function.default = getattr(declared, "default", None)  # named by compilation passes; eager mode has none
            setattr(torch.ops._C, function.__name__, function)
    _round_inputs()


def _round_inputs() -> None:
    """Lets the kernel for one scale per tensor round its inputs.

    On CPUs with AMX, but without its FP8 instructions, vLLM computes FP8 x FP8 linears as FP8 x BF16 ones
    (``CPUFp8PerTensorScaledMMLinearKernel``), and never reads a checkpoint's ``input_scale``. E4M3 is exact in BF16:
    the kernel gets the rounded inputs, and their scale as a part of that of the weights.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel as Kernel

    load, compute = Kernel.process_weights_after_loading, Kernel.apply_weights

    def process_weights_after_loading(self, layer):
        load(self, layer)
        _, weight_scale, input_scale, _ = self._get_layer_params(layer)
        if input_scale is not None:  # otherwise a scale of each batch's own: left as it is
            weight_scale.data.mul_(input_scale.float())

    def apply_weights(self, layer, x, bias=None):
        input_scale = self._get_layer_params(layer)[2]
        if input_scale is not None:
            rounded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            static_scaled_fp8_quant(rounded, x, input_scale)
            x = rounded.to(x.dtype)
        return compute(self, layer, x, bias)

    Kernel.process_weights_after_loading, Kernel.apply_weights = process_weights_after_loading, apply_weights


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
