"""Linears that take a known time: a quantized one half of what another takes."""

import re
import time

import torch

SECONDS = 4e-4


class UnquantizedLinearMethod:
    pass


class FakeKernel:
    pass


class QuantizedLinearMethod:
    def __init__(self):
        self.kernel = FakeKernel()


class LinearBase(torch.nn.Module):
    def __init__(self, rows, columns, quantized):
        super().__init__()
        self.output_size, self.input_size = rows, columns
        self.quant_method = QuantizedLinearMethod() if quantized else UnquantizedLinearMethod()
        self.scale = torch.nn.Parameter(torch.ones(1))
        stored = torch.empty(rows, columns, dtype=torch.int8 if quantized else torch.bfloat16)
        self.weight = torch.nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        assert x.shape[1] == self.input_size
        assert x.dtype == torch.bfloat16
        time.sleep(SECONDS / 2 if isinstance(self.quant_method, QuantizedLinearMethod) else SECONDS)


def blocks(config):
    """Those of a Llama, fused; quantized is what the configuration does not ignore."""
    quantization = config.get("quantization_config")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    made = []
    for block in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            ("self_attn.q_proj", hidden + 2 * keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", 2 * inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            full = f"model.layers.{block}.{name}"
            ignored = [] if quantization is None else quantization["ignore"]
            left = any(full == one or (one.startswith("re:") and re.match(one[3:], full)) for one in ignored)
            made.append(LinearBase(rows, columns, quantization is not None and not left))
    return torch.nn.ModuleList(made)
