"""compressed-tensors exports: proven by our reader, and loaded by plain transformers to the same weights and logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from layerbits.checkpoint import write_compressed
from layerbits.checkpoint.logits import DRIFT_BOUND
from layerbits.checkpoint.quantization import read_quantization
from layerbits.checkpoint.reader import INDEX, open_checkpoint
from layerbits.checkpoint.restore import restore
from layerbits.errors import Unsupported, UserError
from layerbits.export.scheme import NotProven, export_scheme

from .export_support import FILES, planned, spoil
from .schemes_support import HELD_OUT, logits
from .scoring_support import candidate

EVERY = ("qkv", "o", "gate_up", "down")
LAYER = "model.layers.0.mlp.down_proj"
INT8 = candidate("wint8_aint8", "recipe_match_channel_token")
INT4 = candidate("wint4_afp16", "w_group32")


def everywhere(made):
    return dict.fromkeys(EVERY, made)


def exported(folder, kind="llama", dtype=torch.bfloat16, **assigned):
    return export_scheme(planned(kind, folder, format="compressed-tensors", dtype=dtype, **assigned), "cpu")


def loaded(folder, kind="llama", dtype="auto"):
    """The export as plain transformers loads it, after the forward at which it decompresses."""
    cls = AutoModelForImageTextToText if "vl" in kind else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        model(HELD_OUT[0].segments[0].input_ids)
    return model


CASES = [
    ("llama", "wint8_aint8", "recipe_match_channel_token", "mxfp4", "INT8_CHANNEL-INT8_TOKEN"),
    ("qwen2_5_vl", "wint8_aint8", "default", "mxfp4", "INT8_CHANNEL-INT8_TENSOR"),
    ("qwen3_vl", "wint8_afp16", "default", "mxfp4", "INT8_CHANNEL-A16"),
    ("llama", "wint4_afp16", "default", "mxfp4", "INT4_GROUP128-A16"),
    ("qwen2_5_vl", "wint4_afp16", "w_group64", "mxfp4", "INT4_GROUP64-A16"),
    ("llama", "wint4_afp8", "a_per_token_dynamic", "mxfp4", "INT4_GROUP128-FP8_TOKEN"),
    ("llama", "wint4_aint8", "a_per_token_dynamic", "mxfp4", "INT4_GROUP128-INT8_TOKEN"),
    ("llama", "wfp8_afp8", "default", "mxfp4", "FP8_TENSOR-FP8_TENSOR"),
    ("qwen3_vl", "wfp8_afp8", "recipe_match_channel_token", "mxfp4", "FP8_CHANNEL-FP8_TOKEN"),
    ("llama", "wfp8_afp16", "default", "mxfp4", "FP8_TENSOR-A16"),
    ("qwen2_5_vl", "wfp4_afp16", "default", "nvfp4", "NVFP4-A16"),
    ("llama", "wfp4_afp16", "default", "mxfp4", "MXFP4-A16"),
    ("llama", "wfp4_afp8", "a_per_token_dynamic", "mxfp4", "MXFP4-FP8_TOKEN"),
]


@pytest.mark.parametrize(("kind", "pair", "overlay", "variant", "label"), CASES)
def test_transformers_loads_what_was_scored(tmp_path, kind, pair, overlay, variant, label):
    made = exported(tmp_path, kind, **everywhere(candidate(pair, overlay, variant)))
    assert made.proof.record.labels == {label: 14}
    assert made.proof.logits.deviation == 0.0
    ours = restore(open_checkpoint(made.folder), read_quantization(open_checkpoint(made.folder)), "cpu")
    theirs = loaded(made.folder, kind)
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, theirs.get_parameter(name)), name
    if label.endswith("-A16"):
        assert torch.equal(logits(ours), logits(theirs))
    else:  # the library rounds activations in bfloat16, INT8 by range / 127.5: another draw of the same noise
        apart = (logits(ours).float() - logits(theirs).float()).square().mean().sqrt()
        assert apart < DRIFT_BOUND * made.proof.logits.effect
