"""Small models, rows, candidates and jobs for tests of the engines; needs torch and ModelOpt, but no MLflow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from layerbits.candidates import backends
from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.capability import check
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.errors import Unsupported
from layerbits.inputs import smollm2
from layerbits.inputs.calibration import Batch, Calibration, Segment
from layerbits.inputs.captions import load_captions
from layerbits.inputs.models import LoadedModel, language_model_linears
from layerbits.results.result import ModelInfo
from layerbits.scoring.job import ScoringJob

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
VOCABULARY = 384
PAIRS = tuple(p.name for p in load_pairs() if not p.experimental)
SIX = ("wfp4_afp8", "wfp4_afp16", "wfp8_afp8", "wfp8_afp16", "wint8_afp16", "wint8_afp8")
OVERLAYS = tuple(o.name for o in load_overlays())

_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.1,
}  # fmt: skip
_VISION = {"depth": 1, "num_heads": 2}


def tiny_model(kind, **changes):
    """A random model of two blocks in float32; widths are multiples of 128 (the largest block of any format).

    Args:
        kind: ``llama``, ``qwen3_vl``, ``qwen2_5_vl``, ``qwen3_moe``, ``qwen3_vl_moe`` or ``mixtral``.
        changes: Further values of its (text) config.
    """
    import transformers as hf

    torch.manual_seed(0)
    text = {**_TEXT, **changes}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**text))
    elif kind == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_section": [8, 4, 4]}}
        vision = {**_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": text["hidden_size"]}
        config = hf.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **tied)
        model = hf.Qwen3VLForConditionalGeneration(config)
    elif kind == "qwen2_5_vl":
        text |= {"rope_parameters": {**rope, "mrope_section": [8, 4, 4]}}
        vision = {**_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": text["hidden_size"]}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, **tied)
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
        text |= {"rope_parameters": {**rope, "mrope_section": [8, 4, 4]}}
        vision = {**_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": text["hidden_size"]}
        vision |= {"deepstack_visual_indexes": [0]}
        model = hf.Qwen3VLMoeForConditionalGeneration(
            hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tied)
        )
    elif kind == "qwen3_moe":
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**text, **moe))
    else:
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**text, num_local_experts=4, num_experts_per_tok=2))
    return model.float().eval()


def knowing(model, tokens):
    """The random model with a liking for some tokens, so that it predicts them better than guessing.

    All token embeddings get one direction, which the last hidden state then has too, and the output head looks for it.
    """
    with torch.no_grad():
        model.get_input_embeddings().weight += 2
        model.get_output_embeddings().weight[sorted(tokens)] += 10 / model.config.hidden_size
    return model


def everyday_tokens(size="32"):
    """Tokens of the shipped captions under the default model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint())
    captions = load_captions("everyday", size).captions
    return {t for ids in tokenizer(list(captions))["input_ids"] for t in ids} | {tokenizer.eos_token_id}


def small_checkpoint(folder, size="32", **changes):
    """Saves a tiny Llama that predicts the shipped captions better than guessing, with a tokenizer trained on them.

    The default model's tokenizer has 49,152 tokens, and logits over those take most of the time of a tiny model.

    Args:
        folder: Where to.
        size: Captions whose tokens it knows.
        changes: Further values of its config.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint())
    tokenizer = tokenizer.train_new_from_iterator(load_captions("everyday", "512").captions, 2048)
    tokenizer.chat_template = None
    captions = load_captions("everyday", size).captions
    known = {t for ids in tokenizer(list(captions))["input_ids"] for t in ids} | {tokenizer.eos_token_id}
    knowing(tiny_model("llama", vocab_size=len(tokenizer), **changes), known).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def loaded(model):
    """A model as ``layerbits.inputs.loading.load`` hands it over."""
    model.config.use_cache = False
    name = type(model).__name__
    return LoadedModel(model, None, ModelInfo(name, name, "0", name, "float32"), language_model_linears(model))


def random_segment(rows, length, seed=0, first=0, caption=5):
    """Packed rows of random tokens, cut into captions of some tokens each, numbered from ``first``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 0] = False
    sample = (first + torch.arange(rows * length).reshape(rows, length) // caption).int()
    return Segment(ids, None, mask, sample)


def rows(*batches):
    """A calibration of the given batches (tuples of segments), scored on all of them."""
    made = tuple(Batch(tuple(b)) for b in batches)
    samples = 1 + max(int(s.sample.max()) for b in made for s in b.segments)
    return Calibration(made, made, samples, ())


def usual_rows():
    """Two batches: two full rows, and one full row with a shorter last one."""
    return rows(
        [random_segment(2, 20, seed=1)],
        [random_segment(1, 20, seed=2, first=8), random_segment(1, 11, seed=3, first=12)],
    )


def candidate(pair, overlay="default", variant="mxfp4"):
    """A shipped pair under a shipped overlay."""
    mapping = yaml.safe_load((CONFIGS / "quant_pair" / f"{pair}.yaml").read_text())
    over = yaml.safe_load((CONFIGS / "quant_granularity" / f"{overlay}.yaml").read_text())
    return resolve_candidate(QuantPair.from_mapping(mapping), Overlay.from_mapping(over), variant, experimental=True)


def search_config(made, device="cpu"):
    """Its search config; on a CPU FP4 is computed by the reference backend."""
    config = made.search_config()
    if device == "cpu":
        backends.register_backends()
        config = backends.with_reference_backend(config)
    return config


def configs(*pairs, overlay="default", device="cpu"):
    """Search configs of pairs by candidate name."""
    made = [candidate(pair, overlay) for pair in pairs]
    return {m.info.name: search_config(m, device) for m in made}


def distinct_candidates(pairs=PAIRS, cuda=False):
    """Every shipped pair under every overlay that runs here, each effective configuration once."""
    found = {}
    for pair in pairs:
        for overlay in OVERLAYS:
            made = candidate(pair, overlay)
            try:
                check(made, {}, cuda)
            except Unsupported:
                continue
            found.setdefault(made.info.config_hash, made)
    return list(found.values())


def job(subject, folder, wanted, calibration=None, *, scored=None, method="gradient", **changes):
    """A scoring job on every linear of the language model but the head."""
    head = subject.model.get_output_embeddings()
    names = tuple(n for n in subject.linears if subject.model.get_submodule(n) is not head)
    made = ScoringJob(
        subject, scored or names, wanted, calibration or usual_rows(), method, 12.0, Path(folder), "fingerprint"
    )
    return replace(made, **changes)


def reached_from_images(groups, calibration):
    """Whether what a group computes at image positions can change a word that is predicted.

    Behind its keys and values, the last block changes only the word that each position itself predicts.
    """
    segments = [s for batch in calibration.score for s in batch.segments]
    predicts = any(bool((s.image_tokens[:, :-1] & s.loss_mask[:, 1:]).any()) for s in segments)
    last = max(group.block for group in groups)
    return np.array([predicts or group.block < last or group.kind == "qkv" for group in groups])


def recipe(state, bits):
    """What ModelOpt's own tool makes of a search state under another budget."""
    import modelopt.torch.quantization as mtq

    return mtq.get_auto_quantize_config(state, {"effective_bits": bits})
