"""An engine whose requests take a known time, without a model."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

PREFILL, STEP = 2e-4, 4e-3
"""Seconds of a prompt's token, and of a decode step."""


class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, max_model_len, enforce_eager=False, mode="well", **_):
        if mode in ("dies", "untimed"):
            raise ValueError("no such kernel")
        if mode == "never":
            time.sleep(300)
        import torch  # not above: the servers of tests need none

        self.longest, self.packed = max_model_len, mode == "packed"
        self.config = json.loads((Path(model) / "config.json").read_text())
        if mode == "quantized" and "quantization_config" not in self.config:
            raise ValueError("CUDA out of memory")
        config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=16),
            model_config=SimpleNamespace(enforce_eager=enforce_eager, dtype=torch.bfloat16, get_vocab_size=lambda: 100),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config, model_config=config.model_config)
        if mode == "no_int4" and '"num_bits": 4' in json.dumps(self.config):
            raise ValueError("no kernel for INT4 here")

    def apply_model(self, function):
        """Of linears as the config has them; of one that shares its weight with another, where it has none."""
        if "hidden_size" in self.config:
            from vllm.model_executor.layers.linear import blocks

            made = blocks(self.config)
            if self.packed:  # as kernels for CPUs do, which keep the weights themselves
                made[0].weight = None
            return [function(made)]
        import torch

        first, second = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(16, 32, bias=False)
        second.weight = torch.nn.Parameter(first.weight.data)
        return [function(torch.nn.ModuleList([first, second]))]

    def generate(self, prompts, sampling, use_tqdm):
        assert all(len(p["prompt_token_ids"]) + sampling.max_tokens <= self.longest for p in prompts)
        tokens = sum(len(p["prompt_token_ids"]) for p in prompts)
        time.sleep(PREFILL * tokens + STEP * (sampling.max_tokens - 1))
