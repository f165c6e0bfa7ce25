"""A tiny random checkpoint of every family of language models that is named in ``docs/models.md``."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 384
_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.1, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [8, 4, 4]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SHARED = {"shared_expert_intermediate_size": 128}
_HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 32,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 128}
_QWEN2_TOWER = {"depth": 1, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 128}
_GEMMA_IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
_DEEPSTACK = {**_QWEN_TOWER, "deepstack_visual_indexes": [0]}


def _causal(stem: str, *, model: str = "ForCausalLM", config: str = "Config", **changes: Any) -> Any:
    import transformers as hf

    return getattr(hf, stem + model)(getattr(hf, stem + config)(**{**_TEXT, **changes}))


def _vision(stem: str, vision: dict[str, Any], text_config: Any = None, **changes: Any) -> Any:
    import transformers as hf

    outer = {"tie_word_embeddings": False, **changes.pop("outer", {})}
    text = {**_TEXT, **changes}
    config = getattr(hf, f"{stem}Config")(
        text_config=text if text_config is None else text_config(**text), vision_config=dict(vision), **outer
    )
    return getattr(hf, f"{stem}ForConditionalGeneration")(config)


def _gpt2() -> Any:
    return _causal(
        "GPT2", model="LMHeadModel", n_embd=128, n_layer=2, n_head=4, n_inner=256, n_positions=64,
        resid_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip


def _llama_text(**text: Any) -> Any:
    import transformers as hf

    return hf.LlamaConfig(**text)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _causal("Llama"),
    "mistral": lambda: _causal("Mistral", head_dim=32),
    "qwen2": lambda: _causal("Qwen2"),
    "qwen3": lambda: _causal("Qwen3", head_dim=32),
    "gemma2": lambda: _causal("Gemma2", head_dim=32),
    "gemma3_text": lambda: _causal("Gemma3", config="TextConfig", head_dim=32),
    "gemma3": lambda: _vision("Gemma3", _TOWER, head_dim=32, outer=_GEMMA_IMAGES),
    "gemma3n_text": lambda: _causal(
        "Gemma3n", config="TextConfig", num_hidden_layers=4, num_kv_shared_layers=2, head_dim=32, laurel_rank=16,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCABULARY, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
        tie_word_embeddings=False,
    ),
    "gemma4_text": lambda: _causal(
        "Gemma4", config="TextConfig", num_hidden_layers=4, num_kv_shared_layers=2, head_dim=32, global_head_dim=32,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCABULARY, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=False,
    ),
    "phi3": lambda: _causal("Phi3"),
    "smollm3": lambda: _causal("SmolLM3"),
    "olmo2": lambda: _causal("Olmo2"),
    "gpt2": _gpt2,
    "gpt_neox": lambda: _causal("GPTNeoX"),
    "opt": lambda: _causal("OPT", ffn_dim=256, word_embed_proj_dim=128, dropout=0.0),
    "bloom": lambda: _causal("Bloom", n_layer=2, n_head=4),
    "falcon": lambda: _causal("Falcon", ffn_hidden_size=256),
    "qwen2_vl": lambda: _vision("Qwen2VL", _QWEN2_TOWER, rope_parameters=_MROPE),
    "qwen2_5_vl": lambda: _vision(
        "Qwen2_5_VL", {**_QWEN_TOWER, "fullatt_block_indexes": [0]}, rope_parameters=_MROPE
    ),
    "qwen3_vl": lambda: _vision("Qwen3VL", _DEEPSTACK, rope_parameters=_MROPE, head_dim=32),
    "llava": lambda: _vision("Llava", _TOWER, _llama_text, outer={"image_token_index": 5}),
    "smolvlm": lambda: _vision("SmolVLM", _TOWER, _llama_text, outer={"image_token_id": 5}),
    "mixtral": lambda: _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: _causal("Qwen3Moe", **_MOE, head_dim=32),
    "qwen3_vl_moe": lambda: _vision("Qwen3VLMoe", _DEEPSTACK, **_MOE, rope_parameters=_MROPE, head_dim=32),
    "deepseek_v3": lambda: _causal(
        "DeepseekV3", num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=32,
    ),
    "gpt_oss": lambda: _causal(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=32, intermediate_size=128,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "olmoe": lambda: _causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: _causal("Phimoe", num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": lambda: _causal(
        "Glm4Moe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, n_group=1, topk_group=1,
        first_k_dense_replace=1, head_dim=32, n_shared_experts=1,
    ),
    "minimax": lambda: _causal(
        "MiniMax", num_local_experts=4, num_experts_per_tok=2, head_dim=32, block_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "qwen3_next": lambda: _causal("Qwen3Next", **_MOE, **_SHARED, **_HYBRID),
    "qwen3_5": lambda: _vision("Qwen3_5", _QWEN_TOWER, **_HYBRID, rope_parameters=_MROPE),
    "qwen3_5_moe": lambda: _vision("Qwen3_5Moe", _QWEN_TOWER, **_MOE, **_SHARED, **_HYBRID, rope_parameters=_MROPE),
    "nemotron_h": lambda: _causal(
        "NemotronH", num_hidden_layers=4, layers_block_type=["mamba", "attention", "moe", "mlp"], head_dim=32,
        mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=2, chunk_size=16, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128, n_group=1,
        topk_group=1,
    ),
    "zamba2": lambda: _causal(
        "Zamba2", num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
        num_key_value_heads=4, attention_head_dim=64, mamba_d_state=16, n_mamba_heads=4, chunk_size=16, adapter_rank=16,
        use_mamba_kernels=False, use_shared_attention_adapter=True, use_mem_rope=True,
    ),
    "jamba": lambda: _causal(
        "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, use_mamba_kernels=False, **_MAMBA,
    ),
}  # fmt: skip
"""Family, as ``model_type`` names it → a builder of a random model."""


def build(family: str) -> Any:
    """The family's tiny model in float32 and eval mode; the same numbers on every machine."""
    import torch

    torch.manual_seed(0)
    model = FAMILIES[family]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("correct_output_scale"):  # zeros at random, and nothing behind it would count
                parameter.fill_(1)
    return model


EXCLUDED = {"zamba2": "adapter_list"}
"""Family → part of the names of linears that a text reaches in some blocks only, though all blocks hold them."""


def scored(family: str, linears: Iterable[str]) -> tuple[str, ...]:
    """Those linears of a family that are scored."""
    return tuple(name for name in linears if family not in EXCLUDED or EXCLUDED[family] not in name)


_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
WITH_PICTURES: dict[str, Callable[[], Any]] = {
    **{name: FAMILIES[name] for name in (*_QWEN, "smolvlm")},
    "gemma3": lambda: _vision("Gemma3", {**_TOWER, "vision_use_head": False}, head_dim=32, outer=_GEMMA_IMAGES),
    "llava": lambda: _vision(
        "Llava", _TOWER, _llama_text, outer={"image_token_index": 5, "vision_feature_layer": -1}
    ),
    "internvl": lambda: _vision(
        "InternVL", {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]}, outer={"image_token_id": 5}
    ),
    "mistral3": lambda: _vision("Mistral3", {**_TOWER, "image_size": 56}, head_dim=32, outer={"image_token_index": 5}),
}  # fmt: skip
"""Families that see pictures."""

WITHOUT_PROCESSOR = ("smolvlm", "mistral3")
"""Their processors need torchvision: these have rows made by hand (:func:`picture_batch`)."""

_MARKS = {
    "gemma3": ("<boi>", "<image_soft_token>"),
    "llava": ("<image>",) * 2,
    "internvl": ("<IMG_CONTEXT>",) * 2,
}
"""What stands for a picture in the chat template, and in the row."""


def build_with_processor(family: str, folder: Path) -> Any:
    """The family's tiny model, saved with a tokenizer of bytes, a chat template and a small processor.

    Args:
        family: One of :data:`WITH_PICTURES`.
        folder: Where to.
    """
    import torch

    torch.manual_seed(0)
    model = WITH_PICTURES[family]().float().eval()
    mark, token = _MARKS.get(family, ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"))
    config = model.config
    if family == "gemma3":  # zeros until it is trained
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    if family in _QWEN:
        config.image_token_id, config.video_token_id = 5, 6
        config.vision_start_token_id, config.vision_end_token_id = 7, 8
    config.text_config.max_position_embeddings = 512
    model.save_pretrained(folder)
    if family in WITHOUT_PROCESSOR:
        return model
    tokenizer = _tokenizer(family, token)
    template = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}" + mark
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )  # fmt: skip
    _processor(family, tokenizer, template).save_pretrained(folder)
    return model


def _tokenizer(family: str, token: str) -> Any:
    """Bytes, and the marks that processors look for: the placeholder is token 5."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<boi>", "<eoi>", token, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    marks += ["<|turn|>", "<|end|>", "<img>", "</img>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*marks, *letters])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    named = {
        "gemma3": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": token},
        "internvl": {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": token,
            "video_token": "<|video_pad|>",
        },
    }.get(family, {})  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )


def _processor(family: str, tokenizer: Any, template: str) -> Any:
    """A processor whose pictures become a few tokens."""
    import transformers as hf

    from layerbits.inputs.processor import still_class

    if family.startswith("qwen"):
        stem = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(family, "Qwen3VL")
        patch = 16 if stem == "Qwen3VL" else 14
        images = hf.Qwen2VLImageProcessorPil(
            patch_size=patch, min_pixels=(2 * patch) ** 2 * 4, max_pixels=(2 * patch) ** 2 * 6
        )
        return still_class(getattr(hf, f"{stem}Processor"))(images, tokenizer, chat_template=template)
    if family == "gemma3":
        images = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
        return hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    if family == "llava":
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        return hf.LlavaProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
            num_additional_image_tokens=1,
        )  # fmt: skip
    assert family == "internvl"
    images = hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False)
    return still_class(hf.InternVLProcessor)(images, tokenizer, None, image_seq_length=1, chat_template=template)


def picture_batch(family: str) -> Any:
    """Two segments of random pixels and words for a family whose own processor needs torchvision."""
    import torch

    from layerbits.inputs.calibration import Batch, PictureRow, Segment

    generator = torch.Generator().manual_seed(0)
    side, images, marks = {"smolvlm": (28, 2, 2), "mistral3": (56, 1, 4)}[family]
    ids = torch.randint(20, VOCABULARY, (2, 24), generator=generator)
    ids[:, 3 : 3 + marks] = 5
    at_image = ids == 5
    mask = torch.zeros_like(at_image)
    mask[:, 3 + marks :] = True
    pixels = torch.randn((2, images, 3, side, side), generator=generator)
    rows = [{"pixel_values": p[None] if family == "smolvlm" else p} for p in pixels]
    if family == "mistral3":
        rows = [{**row, "image_sizes": torch.tensor([[side, side]])} for row in rows]
    sample = torch.arange(2, dtype=torch.int32)[:, None].expand(2, 24).contiguous()
    whole = Segment(ids, None, mask, sample, tuple(PictureRow(row) for row in rows), at_image)
    return Batch((whole.part(slice(1)), whole.part(slice(1, 2))))
