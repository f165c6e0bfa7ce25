"""compressed-tensors exports: proven by our reader, and loaded by plain transformers to the same weights and logits."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Llama4ForCausalLM, Llama4TextConfig

from layerbits.checkpoint import shards
from layerbits.checkpoint.label import COMPRESSED
from layerbits.checkpoint.labels import label_of, read_quantization
from layerbits.checkpoint.logits import DRIFT_BOUND
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.restore import restore
from layerbits.checkpoint.write_compressed import quantization_config
from layerbits.errors import Unsupported, UserError
from layerbits.export.plan import plan_export
from layerbits.export.scheme import NotProven, export_scheme
from layerbits.inputs.models import language_model_linears, output_head, unscored_patterns
from layerbits.inputs.names import names_on_disk
from layerbits.inputs.weights import INDEXES
from layerbits.results.assignment import Assignment
from layerbits.results.result import Group
from layerbits.scoring.groups import named_groups
from layerbits.scoring.state import decisions
from tests.families import build

from .export_support import FILES, planned, prepared, saved, spoil
from .schemes_support import HELD_OUT, logits
from .scoring_support import VOCABULARY, candidate

EVERY = ("qkv", "o", "gate_up", "down")
LAYER = "model.layers.0.mlp.down_proj"
INT8 = candidate("wint8_aint8", "recipe_match_channel_token")
INT4 = candidate("wint4_afp16", "w_group32")
FP8 = candidate("wfp8_afp8")
NVFP4 = candidate("wfp4_afp16", variant="nvfp4")


def everywhere(made):
    return dict.fromkeys(EVERY, made)


def exported(folder, kind="llama", dtype=torch.bfloat16, **assigned):
    return export_scheme(planned(kind, folder, format="compressed-tensors", dtype=dtype, **assigned), "cpu")


def loaded(folder, kind="llama", dtype="auto"):
    """The export as plain transformers loads it, after the forward at which it decompresses."""
    cls = AutoModelForImageTextToText if "vl" in kind else AutoModelForCausalLM
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model = cls.from_pretrained(folder, dtype=dtype).eval()
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
    ("qwen3_vl", "wfp4_afp4", "default", "nvfp4", "NVFP4-NVFP4"),
    ("llama", "wmxfp8_amxfp8", "default", "mxfp4", "MXFP8-MXFP8"),
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


def test_a_float32_model_has_equal_logits_too(tmp_path):
    made = exported(tmp_path, dtype=torch.float32, **everywhere(INT4))
    ours = restore(open_checkpoint(made.folder), read_quantization(open_checkpoint(made.folder)), "cpu")
    assert torch.equal(logits(ours), logits(loaded(made.folder)))


@pytest.mark.parametrize(
    ("assigned", "formats"),
    [
        ({"qkv": INT8, "o": INT8, "down": INT4}, {"INT8_CHANNEL-INT8_TOKEN": 8, "INT4_GROUP32-A16": 2}),
        ({"qkv": FP8, "gate_up": FP8, "down": NVFP4}, {"FP8_TENSOR-FP8_TENSOR": 10, "NVFP4-A16": 2}),
    ],
    ids=["int8+int4", "fp8+nvfp4"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
def test_a_mixed_scheme_is_a_config_group_per_format(tmp_path, kind, assigned, formats):
    made = exported(tmp_path, kind, **assigned)
    assert made.proof.record.labels == formats
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 2
    targets = {target for group in config["config_groups"].values() for target in group["targets"]}
    assert not targets & set(config["ignore"])
    if kind == "qwen2_5_vl":
        assert r"re:(.*\.)?visual\..*" in config["ignore"]
    ours = restore(open_checkpoint(made.folder), read_quantization(open_checkpoint(made.folder)), "cpu")
    theirs = loaded(made.folder, kind)
    assert all(torch.equal(weight, theirs.get_parameter(name)) for name, weight in ours.named_parameters())


@pytest.mark.parametrize("head", [INT8, INT4], ids=["one format", "two"])
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
def test_a_quantized_output_head_has_a_target_that_vllm_finds_it_by(tmp_path, kind, head):
    source = tmp_path / "source"
    ready = prepared(saved(kind, source), source, o=INT8)
    scheme = ready.scheme
    group = Group("lm_head", None, "lm_head", ("lm_head",), 1000)
    names = Assignment((*scheme.assignment, head.info.name))
    used = tuple({one.info.name: one.info for one in (INT8, head)}.values())
    scheme = replace(scheme, groups=(*scheme.groups, group), assignment=names, candidates=used)
    made = export_scheme(plan_export(replace(ready, scheme=scheme), tmp_path / "out", "compressed-tensors"), "cpu")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    # vLLM compares the whole name, and the name of the class for targets like "Linear"
    targets = [group["targets"] for group in config["config_groups"].values()]
    (pattern,) = [t.removeprefix("re:") for t in targets[-1] if t.startswith("re:")]
    assert all(re.match(pattern, name) for name in ("lm_head", "language_model.lm_head"))
    assert not re.match(pattern, "model.lm_head_norm")
    ours = restore(open_checkpoint(made.folder), read_quantization(open_checkpoint(made.folder)), "cpu")
    theirs = loaded(made.folder, kind)
    assert all(torch.equal(weight, theirs.get_parameter(name)) for name, weight in ours.named_parameters())


def test_experts_that_no_decision_is_made_about_are_ignored_by_name():
    sizes = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    config = Llama4TextConfig(**sizes, **heads, num_local_experts=4, pad_token_id=0, tie_word_embeddings=False)
    model = Llama4ForCausalLM(config)
    shared = "model.layers.0.feed_forward.shared_expert.down_proj"
    layer = SimpleNamespace(module=shared, stored=shared, label=label_of(INT8.info, COMPRESSED))
    config = quantization_config(model, [layer], names_on_disk(model), ())
    patterns = [pattern.removeprefix("re:") for pattern in config["ignore"] if pattern.startswith("re:")]
    # the names by which vLLM asks for routed experts, whatever the files call them
    asked = [f"model.layers.{block}.feed_forward.experts.0.gate_proj" for block in range(2)]
    assert all(any(re.match(pattern, name) for pattern in patterns) for name in asked)
    assert not any(re.match(pattern, shared) for pattern in patterns)


def test_everything_else_is_the_sources(tmp_path):
    made = exported(tmp_path, "qwen2_5_vl", down=INT8)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", made.folder))
    same = [n for n in before if n in after and torch.equal(before[n], after[n])]
    assert {n for n in before if n not in same} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert {name: (made.folder / name).read_text() for name in FILES} == FILES


def test_shards_hold_all_of_it(tmp_path, monkeypatch):
    whole = exported(tmp_path / "one", **everywhere(INT4))
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    made = exported(tmp_path / "two", **everywhere(INT4))
    assert len(list(made.folder.glob("model-*.safetensors"))) > 2
    assert (made.folder / INDEXES[0]).is_file()
    assert made.proof.record.weights == whole.proof.record.weights


def _changed(part, change):
    def spoiled(tensors, _config):
        name = f"{LAYER}.{part}"
        tensors[name] = change(tensors[name].clone())

    return spoiled


def _config(**changes):
    return lambda _tensors, config: config["quantization_config"].update(changes)


def _first_word(tensor):
    tensor[0, 0] ^= 1
    return tensor


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed("weight_packed", _first_word), "1 of 32768 weights"),
        (_changed("weight_packed", lambda t: t.roll(1, 0)), "are not the scored ones"),
        (_changed("weight_scale", lambda t: t * 1.01), "are not the scored ones"),
        (_changed("weight_shape", lambda t: t.flip(0)), "weight_shape is not"),
        (lambda t, _: t.pop(f"{LAYER}.weight_scale"), "has no weight_scale"),
        (lambda t, _: t.update({f"{LAYER}.weight_scale_2": torch.ones(())}), "has a weight_scale_2"),
        (_config(format="int-quantized"), "says format int-quantized"),
        (_config(quantization_status="frozen"), "quantization_status is frozen"),
        (_config(ignore=[]), "no pattern excludes it"),
        (_config(ignore=["lm_head", LAYER]), "which is quantized"),
    ],
)
def test_a_changed_number_is_found(tmp_path, monkeypatch, change, says):
    plan = planned("llama", tmp_path, format="compressed-tensors", **everywhere(INT4))
    spoil(monkeypatch, change)
    with pytest.raises(NotProven) as error:
        export_scheme(plan, "cpu")
    proof = json.loads((error.value.report / "proof.json").read_text())
    assert any(says in problem for problem in proof["problems"]), proof["problems"]


def test_an_fp8_cache_is_left_to_modelopt(tmp_path):
    with pytest.raises(UserError, match="use format=modelopt, or kv_cache=none"):
        planned("llama", tmp_path, format="compressed-tensors", kv_cache="fp8", **everywhere(FP8))
    assert planned("llama", tmp_path, kv_cache="fp8", **everywhere(FP8)).format == "modelopt"
    with pytest.raises(Unsupported, match="proven with one of fp8 alone"):
        planned("llama", tmp_path, kv_cache="nvfp4", **everywhere(FP8))
    assert planned("llama", tmp_path, **everywhere(INT8)).format == "compressed-tensors"
    with pytest.raises(Unsupported, match="kv_cache=none leaves it out"):
        planned("llama", tmp_path, kv_cache="fp8", **everywhere(INT8))


def test_a_format_that_no_runtime_computes_is_refused_before_loading(tmp_path):
    with pytest.raises(Unsupported, match="would leave the activations"):
        planned("llama", tmp_path, down=candidate("wfp8_aint8"))


def test_fused_linears_share_the_scale_that_runtimes_have_for_them(tmp_path):
    """FP8 per tensor: one scale for q, k, v, made of the largest range; its own where a runtime has one for each."""
    static = exported(tmp_path / "static", **everywhere(FP8))
    tensors = load_file(static.folder / "model.safetensors")
    scales = {n: float(tensors[f"model.layers.0.self_attn.{n}_proj.weight_scale"]) for n in "qkvo"}
    assert scales["q"] == scales["k"] == scales["v"] != scales["o"]
    alone = exported(tmp_path / "alone", **everywhere(candidate("wfp8_afp16")))
    tensors = load_file(alone.folder / "model.safetensors")
    assert len({float(tensors[f"model.layers.0.self_attn.{n}_proj.weight_scale"]) for n in "qkv"}) == 3


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_a_scale_of_its_own_makes_a_runtime_round_again(tmp_path, monkeypatch, format):
    plan = planned("llama", tmp_path, format=format, **everywhere(FP8))
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    spoil(monkeypatch, lambda tensors, _: tensors.update({name: tensors[name] * 2}))
    with pytest.raises(NotProven) as error:
        export_scheme(plan, "cpu")
    proof = json.loads((error.value.report / "proof.json").read_text())
    assert any("no runtime has to requantize - not so" in problem for problem in proof["problems"])


def test_a_scheme_that_was_scored_with_shared_ranges_is_exported_as_scored(tmp_path):
    plan = planned("llama", tmp_path, format="modelopt", **everywhere(candidate("wfp8_afp8", "w_shared")))
    made = export_scheme(plan, "cpu")
    assert all(layer.error_ratio == 1.0 for layer in made.proof.layers)
    assert made.proof.logits.drift < made.proof.logits.effect


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_what_a_hybrid_fuses_keeps_one_format(tmp_path, monkeypatch, format):
    """Qwen3.5's gated delta nets: ``in_proj_qkv`` with ``in_proj_z``, ``in_proj_a`` with ``in_proj_b``."""
    model = build("qwen3_5").to(torch.bfloat16)
    source = tmp_path / "source"
    model.save_pretrained(source)
    scored = {n for n in language_model_linears(model) if n != output_head(model)}
    found = [
        d for d in decisions(model, unscored_patterns(model, scored)) if d.searched and "conv1d" not in d.modules[0]
    ]
    groups = named_groups(model, [(d.modules, d.weights) for d in found], None)
    leaves = [{name.rpartition(".")[2] for name in group.modules} for group in groups]
    assert {"in_proj_qkv", "in_proj_z"} in leaves
    assert {"in_proj_a", "in_proj_b"} in leaves
    names = [(NVFP4 if "out_proj" in leaf or "down_proj" in leaf else FP8).info.name for leaf in leaves]
    made = prepared(model, source)
    scheme = replace(made.scheme, groups=groups, candidates=(FP8.info, NVFP4.info), assignment=Assignment(names))
    plan = plan_export(replace(made, scheme=scheme), tmp_path / "out", format=format)
    done = export_scheme(plan, "cpu")
    assert len(done.proof.record.labels) == 2
    tensors = load_file(done.folder / "model.safetensors")
    scales = {n: float(t) for n, t in tensors.items() if n.endswith("linear_attn.in_proj_qkv.weight_scale")}
    assert scales == {n: float(tensors[n.replace("in_proj_qkv", "in_proj_z")]) for n in scales}
    assert scales
