"""Models of real shape with random weights, and rows of random tokens: what speed and memory need, without a hub."""

from __future__ import annotations

from typing import Any

import torch

from layerbits.inputs.calibration import Batch, Calibration, Segment
from layerbits.inputs.models import LoadedModel, language_model_linears
from layerbits.results.result import ModelInfo

_TOKENS_PER_CAPTION = 12


def qwen3_vl_4b() -> Any:
    """Config of Qwen3-VL-4B-Instruct (language model: 36 blocks, 3.6 billion weights in its linears)."""
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    return Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [5, 11, 17]}, tie_word_embeddings=True
    )


def qwen2_5_vl_3b() -> Any:
    """Config of Qwen2.5-VL-3B-Instruct (language model: 36 blocks)."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, tie_word_embeddings=True)


def qwen3(blocks: int, hidden: int, intermediate: int, heads: int, head_dim: int = 128) -> Any:
    """Config of a dense Qwen3 (8 key-value heads, untied embeddings)."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=head_dim, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip


def qwen3_32b() -> Any:
    """Config of Qwen3-32B (64 blocks, 31.2 billion weights in them)."""
    return qwen3(64, 5120, 25600, 64)


def qwen3_8b() -> Any:
    """Config of Qwen3-8B (36 blocks, 6.9 billion weights in them)."""
    return qwen3(36, 4096, 12288, 32)


def tiny_llama() -> Any:
    """A model of two blocks, to try a benchmark on a CPU."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024,
    )  # fmt: skip


def smollm2_135m() -> Any:
    """Config of SmolLM2-135M (30 blocks, 106 million weights in its linears): a mid-size model for a CPU."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip


_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip


def qwen3_30b_a3b(**changes: Any) -> Any:
    """Config of Qwen3-30B-A3B (48 blocks of 128 experts, 8 of them for a token)."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**{**_A3B, **changes})


def qwen3_30b_a3b_12() -> Any:
    """The first 12 blocks of Qwen3-30B-A3B."""
    return qwen3_30b_a3b(num_hidden_layers=12)


def qwen3_vl_30b_a3b(**changes: Any) -> Any:
    """Config of Qwen3-VL-30B-A3B-Instruct (the language model is Qwen3-30B-A3B)."""
    from transformers import Qwen3VLMoeConfig

    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048}
    text = {**_A3B, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}
    return Qwen3VLMoeConfig(
        text_config={**text, **changes}, vision_config={**vision, "deepstack_visual_indexes": [8, 16, 24]}
    )


def tiny_experts() -> Any:
    """A mixture of two blocks, to try a benchmark on a CPU."""
    return qwen3_30b_a3b(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=1024, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip


def tiny_vl() -> Any:
    """Qwen3-VL's architecture with two blocks a part, to try a benchmark on a CPU."""
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
    config = Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, tie_word_embeddings=True
    )
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = 1, 2, 3, 4
    return config


SHAPES = {
    "tiny-vl": tiny_vl,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "qwen3-30b-a3b-12": qwen3_30b_a3b_12,
    "qwen3-vl-30b-a3b": qwen3_vl_30b_a3b,
    "tiny-experts": tiny_experts,
    "qwen3-vl-4b": qwen3_vl_4b,
    "qwen2.5-vl-3b": qwen2_5_vl_3b,
    "qwen3-32b": qwen3_32b,
    "qwen3-8b": qwen3_8b,
    "smollm2-135m": smollm2_135m,
    "tiny": tiny_llama,
}


def class_name(config: Any) -> str:
    """Name of the ``transformers`` class of a config: whole vision-language model, or language model with its head."""
    kind = type(config).__name__
    return kind.replace("Config", "ForConditionalGeneration" if "VL" in kind else "ForCausalLM")


def random_model(
    shape: str, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, blocks: int | None = None
) -> LoadedModel:
    """A model of a shape with random weights, or of its first blocks."""
    from layerbits.inputs.models import build

    torch.manual_seed(seed)
    config = SHAPES[shape]()
    if blocks:
        getattr(config, "text_config", config).num_hidden_layers = blocks
    name = class_name(config)
    config.architectures = [name]
    with torch.device(device):
        model = build(config, dtype).eval()
    model.config.use_cache = False
    info = ModelInfo(shape, shape, f"random-{seed}", name, str(dtype).removeprefix("torch."))
    return LoadedModel(model, None, info, language_model_linears(model))


def random_rows(vocabulary: int, steps: int, rows: int, length: int, seed: int = 1) -> Calibration:
    """Packed rows of random tokens, cut into captions of about the usual length."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.bool)
        mask[:, 0] = False
        first = step * rows * length
        sample = ((first + torch.arange(rows * length)) // _TOKENS_PER_CAPTION).reshape(rows, length).int()
        batches.append(Batch((Segment(ids, None, mask, sample),)))
    every = tuple(batches)
    return Calibration(every, every, 1 + int(every[-1].segments[0].sample.max()), ())
