"""What is not the model that was named is refused in one line, as early as its files can tell."""

import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from layerbits.errors import UserError
from layerbits.inputs.loading import empty_model, load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import load_tokenizer, resolve
from layerbits.results.experiment import Experiment

from .checkpoint_support import config, copied, only, quantized_to_fp8, save_tokenizer, sharded, tensors, write
from .scoring_support import tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
PAGE = "<!DOCTYPE html><html><body>Access denied</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
EXPORT = {"scheme": {"name": "fp8_full", "source_run_ids": ["abc123"], "model": {"source": "org/original"}}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A whole checkpoint, in bfloat16 with its tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return copied(original, tmp_path / "model")


def before_weights(folder, **keys):
    """All that is looked at before the weights are loaded."""
    resolved = resolve(ModelSpec("tiny", str(folder), **keys))
    empty_model(resolved)
    load_tokenizer(resolved)
    return resolved


def refused(folder, **keys):
    """The one line that a folder is refused with, before its weights are loaded."""
    with pytest.raises(UserError) as error:
        before_weights(folder, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def quantized(**said):
    return lambda folder: config(folder, quantization_config=said)


def cut(name, size):
    def spoil(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return spoil


def narrow(dtype):
    def spoil(folder):
        tensors(folder, lambda held: held.update({DOWN: held[DOWN].to(dtype)}))

    return spoil


def without_a_shard(folder):
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_the_index(folder):
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()


def after(*spoilers):
    """Spoilers one after the other."""

    def spoil(folder):
        for one in spoilers:
            one(folder)

    return spoil


def as_bin(folder):
    """The weights as PyTorch saves them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_bin_of(value):
    def spoil(folder):
        as_bin(folder)
        torch.save(value, folder / "pytorch_model.bin")

    return spoil


def write_alone(name, text):
    """In place of the safetensors."""
    return after(as_bin, write(name, text))


def dangling(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("gone/file")

    return spoil


def twice_in_shards(folder):
    """The shard that the index does not name for a tensor has zeros under its name."""
    sharded(folder)
    home = json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    other = next(file for file in folder.glob("model-*.safetensors") if file.name != home)
    save_file({**load_file(other), DOWN: torch.zeros(128, 256).bfloat16()}, other, metadata={"format": "pt"})


def twice_in_bin_shards(folder):
    held = load_file(folder / "model.safetensors")
    torch.save(held, folder / "pytorch_model-1.bin")
    torch.save({DOWN: torch.zeros(128, 256)}, folder / "pytorch_model-2.bin")
    where = dict.fromkeys(held, "pytorch_model-1.bin") | {"lm_head.weight": "pytorch_model-2.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()


def with_old_shards(folder):
    new = (folder / "model.safetensors").read_bytes()
    sharded(folder)
    (folder / "model.safetensors").write_bytes(new)


def index_names(name):
    def spoil(folder):
        sharded(folder)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = SHARD
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def inside(*parts):
    def spoil(folder):
        inner = folder.parent / "inner"
        folder.rename(inner)
        folder.joinpath(*parts[:-1]).mkdir(parents=True)
        inner.rename(folder.joinpath(*parts))

    return spoil


def exported(folder):
    said = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}, "quant_algo": "FP8"}
    config(folder, quantization_config=said)
    (folder / "layerbits.json").write_text(json.dumps(EXPORT))


def replaced(name, value):
    return lambda folder: tensors(folder, lambda held: held.update({name: value}))


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
HF_QUANT = json.dumps({"producer": {"name": "modelopt", "version": "0.20"}, "quantization": {"quant_algo": "NVFP4"}})
CODE = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
TOKENIZER_CODE = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}

KINDS = {
    # no checkpoint
    "a GGUF folder": (only("model-Q4_K.gguf"), "GGUF weights for llama.cpp; give the checkpoint"),
    "a LoRA adapter": (write("adapter_config.json", ADAPTER), r"LORA adapter of org/base.*merge_and_unload"),
    "a diffusion pipeline": (only("model_index.json"), "a diffusion pipeline"),
    "the original layout": (only("params.json", "consolidated.00.pth"), "original layout of Llama"),
    "a DeepSpeed checkpoint": (only("zero_to_fp32.py"), "DeepSpeed"),
    "an ONNX model": (only("config.json", "model.onnx"), "an ONNX model"),
    "TensorFlow weights": (only("config.json", "tf_model.h5"), "holds TensorFlow weights"),
    "Flax weights": (only("config.json", "flax_model.msgpack"), "holds Flax weights"),
    "a NeMo archive": (only("model.nemo"), "a NeMo archive; export it"),
    "a distributed checkpoint": (only("__0_0.distcp"), "a distributed checkpoint of PyTorch"),
    "a tokenizer alone": (only("tokenizer.json", "tokenizer_config.json"), "a tokenizer but no model"),
    "weights alone": (only("model.safetensors"), "weights but no config.json"),
    "a trainer's folder": (inside("checkpoint-500"), "give one of checkpoint-500"),
    "a folder of the hub's cache": (inside("snapshots", "0f1e"), "give one of snapshots/0f1e"),
    # damaged files
    "config.json cut off": (cut("config.json", 40), "config.json is not JSON"),
    "config.json as a list": (write("config.json", "[1]"), "no JSON object"),
    "config.json without a type": (lambda f: config(f, "model_type"), "names no model_type"),
    "an unknown architecture": (lambda f: config(f, model_type="own"), "is a own, which transformers .* does not know"),
    "a value of another type": (
        lambda f: config(f, hidden_size="wide"),
        "cannot be read .*hidden_size. expected int, got str",
    ),
    "LFS pointers": (write("model.safetensors", POINTER), "pointer of Git LFS.*git lfs pull"),
    "an LFS pointer as config.json": (write("config.json", POINTER), "pointer of Git LFS"),
    "empty weights": (write("model.safetensors", ""), "model.safetensors is empty"),
    "weights cut in the header": (cut("model.safetensors", 200), r"\(200 bytes\) is no whole safetensors file"),
    "weights cut in the data": (cut("model.safetensors", 200_000), r"\(200,000 bytes\) is no whole safetensors file"),
    "another file as weights": (write("model.safetensors", "x" * 300), "is no whole safetensors file"),
    "PyTorch weights cut off": (after(as_bin, cut("pytorch_model.bin", 200_000)), "is no whole PyTorch file"),
    "another file as PyTorch weights": (
        write_alone("pytorch_model.bin", "x" * 300),
        "is no whole PyTorch file",
    ),
    "PyTorch weights that are a list": (as_bin_of([1]), "holds no tensors by name"),
    "a web page for the weights": (write("model.safetensors", PAGE), r"model.safetensors is a web page \(HTML\)"),
    "a web page for a shard": (after(sharded, write(SHARD, PAGE)), rf"{SHARD} is a web page"),
    "a web page for the index": (after(sharded, write(INDEX, PAGE)), rf"{INDEX} is a web page"),
    "a web page for PyTorch weights": (write_alone("pytorch_model.bin", PAGE), "pytorch_model.bin is a web page"),
    "a web page as config.json": (write("config.json", PAGE), "config.json is a web page"),
    "a web page as tokenizer": (write("tokenizer.json", f"\n  {PAGE.lower()}"), "tokenizer.json is a web page"),
    "a link to no weights": (dangling("model.safetensors"), "model.safetensors is a link to gone/file, which is not"),
    "a link to no shard": (after(sharded, dangling(SHARD)), rf"{SHARD} is a link to gone/file"),
    "a link to no index": (after(sharded, dangling(INDEX)), rf"{INDEX} is a link to gone/file"),
    "a link to no PyTorch weights": (
        after(as_bin, dangling("pytorch_model.bin")),
        "pytorch_model.bin is a link",
    ),
    "a link to no config.json": (dangling("config.json"), "config.json is a link to gone/file"),
    "a link to no tokenizer": (dangling("tokenizer.json"), "tokenizer.json is a link to gone/file"),
    # two truths
    "a tensor in two shards": (
        twice_in_shards,
        rf"two tensors named {DOWN}, in model-0000\d-of-00002.safetensors and in model-0000\d-of-00002.safetensors",
    ),
    "a tensor in two PyTorch shards": (
        twice_in_bin_shards,
        rf"two tensors named {DOWN}, in pytorch_model-1.bin",
    ),
    "new weights beside old shards": (
        with_old_shards,
        "lm_head.weight in model.safetensors, which would be loaded, and in model-00001-of-00002.safetensors",
    ),
    "a second file of the same tensors": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model_merged.safetensors"),
        "in model.safetensors, which would be loaded, and in model_merged.safetensors, which would not; move the one",
    ),
    "shards that the index left behind": (
        after(sharded, lambda f: shutil.copy(f / SHARD, f / "model-00003-of-00003.safetensors")),
        rf"in {SHARD}, which would be loaded, and in model-00003-of-00003.safetensors",
    ),
    "an index of a tensor that no shard has": (
        index_names("model.ghost"),
        rf"lacks tensors that {INDEX} names",
    ),
    # values that make no model
    "a pad token beyond the vocabulary": (
        lambda f: config(f, pad_token_id=50_000),
        "has pad_token_id=50000, beyond its vocab_size=384",
    ),
    "an activation that is not known": (lambda f: config(f, hidden_act="swoosh"), "has hidden_act='swoosh', which"),
    "a rotation that is not known": (
        lambda f: config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "has a rope_type 'spiral'",
    ),
    "no weights": (only("config.json"), "it has no weights"),
    "a missing shard": (without_a_shard, "lacks 1 of the 2 files"),
    "shards without an index": (without_the_index, "2 shards but no model.safetensors.index.json"),
    "weights under another name": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        "has no model.safetensors, only weights.safetensors",
    ),
    # quantized
    "an export of LayerBits": (
        exported,
        r"FP8, modelopt, by modelopt 0.47.0.*exported it as fp8_full from run abc123.*model.path=org/original",
    ),
    "an export of ModelOpt": (write("hf_quant_config.json", HF_QUANT), r"NVFP4, by modelopt 0.20 \(hf_quant_config"),
    "GPTQ": (quantized(quant_method="gptq", bits=4, group_size=128), "already quantized: gptq, 4 bits"),
    "old GPTQ": (write("quantize_config.json", '{"bits": 4}'), r"4 bits \(quantize_config.json\)"),
    "AWQ": (quantized(quant_method="awq", bits=4), "already quantized: awq, 4 bits"),
    "bitsandbytes": (quantized(load_in_4bit=True), "already quantized: bitsandbytes, 4 bits"),
    "compressed-tensors": (
        quantized(quant_method="compressed-tensors", format="int-quantized"),
        "compressed-tensors, int-quantized",
    ),
    "MXFP4": (quantized(quant_method="mxfp4"), "already quantized: mxfp4.*model.dequantize=true"),
    "fine-grained FP8": (quantized_to_fp8, "already quantized: fp8.*model.dequantize=true"),
    "an unnamed method": (quantized(group_size=64), "in a way that it does not name"),
    "quantized in its text part": (
        lambda f: config(f, text_config={"quantization_config": {"quant_method": "gptq", "bits": 8}}),
        r"gptq, 8 bits \(text_config of config.json\)",
    ),
    "FP8 numbers that nobody speaks of": (narrow(torch.float8_e4m3fn), rf"1 weights .*{DOWN} is F8_E4M3"),
    "packed numbers that nobody speaks of": (narrow(torch.uint8), f"{DOWN} is U8"),
    # another model
    "a missing tensor": (lambda f: tensors(f, lambda held: held.pop(DOWN)), rf"lacks 1 tensor of the model \({DOWN}"),
    "a tensor of another shape": (
        replaced(DOWN, torch.zeros(128, 128)),
        r"another shape .*\[128, 128\] instead of \[128, 256\]",
    ),
    "a tensor too many": (
        replaced("model.layers.0.self_attn.q_proj.bias", torch.zeros(128)),
        "1 tensor that the model does not use .model.layers.0.self_attn.q_proj.bias",
    ),
    "a config of fewer blocks": (lambda f: config(f, num_hidden_layers=1), r"has 9 tensors that .* and 6 more"),
    "an encoder-decoder": (
        lambda f: config(f, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "encoder-decoder",
    ),
    "a masked language model": (
        lambda f: config(f, model_type="bert", architectures=["BertForMaskedLM"]),
        "is a BertForMaskedLM, which predicts no next token",
    ),
    "an encoder as a language model": (
        lambda f: config(f, model_type="bert", architectures=["BertLMHeadModel"]),
        "attention sees later tokens",
    ),
    "a model without its head": (lambda f: config(f, architectures=["LlamaModel"]), "is a LlamaModel, which predicts"),
    "a classifier": (lambda f: config(f, architectures=["LlamaForSequenceClassification"]), "predicts no next token"),
    # code
    "code of its own": (lambda f: config(f, **CODE), r"modeling_own.py\); read it, then set model.trust_remote_code"),
    "a tokenizer's own code": (
        write("tokenizer_config.json", json.dumps(TOKENIZER_CODE)),
        r"tokenizer of .*tokenization_own.py.*trust_remote_code=true",
    ),
    # tokenizers
    "no tokenizer": (only("config.json", "model.safetensors"), "holds no tokenizer that can be read"),
    "a damaged tokenizer": (write("tokenizer.json", '{"a": 1}'), "holds no tokenizer that can be read"),
    "an LFS pointer as tokenizer": (write("tokenizer.json", POINTER), "pointer of Git LFS"),
}


def test_the_original_is_not_refused(folder):
    found = before_weights(folder)
    assert found.quantization is None
    assert found.warnings == ()


def test_a_sharded_checkpoint_is_not_refused(folder):
    sharded(folder)
    before_weights(folder)


def test_tied_tensors_are_not_missing(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    before_weights(tmp_path)


def test_an_untied_head_that_is_missing_is(folder):
    tensors(folder, lambda held: held.pop("lm_head.weight"))
    assert "lacks 1 tensor of the model (lm_head.weight)" in refused(folder)


def test_what_headers_cannot_tell_is_refused_on_load(folder):
    held = load_file(folder / "model.safetensors")
    held.pop(DOWN)
    torch.save(held, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    resolved = before_weights(folder)
    with pytest.raises(UserError, match=f"lacks 1 tensor of the model .{DOWN}"):
        load(resolved, None, "cpu")


def test_two_truths_on_the_hub_are_refused_when_they_are_loaded(folder, tmp_path, monkeypatch):
    """What was fetched lies in the cache as the hub has it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0f1e")
    (repository / "snapshots").mkdir()
    twice_in_shards(folder)
    folder.rename(repository / "snapshots" / "0f1e")
    resolved = resolve(ModelSpec("tiny", "org/tiny"))
    with pytest.raises(UserError, match=f"two tensors named {DOWN}, in model-"):
        load(resolved, None, "cpu")


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "optimizer.bin"])
def test_files_of_other_tensors_stay_out_of_it(folder, beside):
    """Mistral's own layout lies beside that of transformers under other names; a trainer leaves its state."""
    save_file({"layers.0.wq.weight": torch.zeros(1)}, folder / beside)
    assert len(load(before_weights(folder), None, "cpu").linears) == 15


@pytest.fixture
def without_rights():
    """A folder in which this process has the rights of nobody, also where root runs the tests."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(made) / "model"
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "."])
def test_what_may_not_be_read_is_named(original, without_rights, name):
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    target = copied(original, without_rights) / name
    without_rights.chmod(0o755)
    for file in without_rights.iterdir():
        file.chmod(0o644)
    target.chmod(stat.S_IWUSR)
    os.seteuid(user)
    said = refused(without_rights)
    assert re.search(rf"cannot read {re.escape(str(target))}\S* .Permission denied.; make it readable", said), said


def test_a_path_that_is_a_link_to_nothing_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to("gone/folder")
    assert "there is no folder model (it is a link to gone/folder)" in refused("model")


def test_random_weights_need_the_config_alone(folder):
    (folder / "model.safetensors").unlink()
    config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert before_weights(folder, random_weights=True).quantization is None


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model.safetensors", "is a file; give the folder that holds it"),
        ("model.gguf", "is GGUF weights for llama.cpp; give the folder"),
        ("model.zip", "is an archive; unpack it"),
        ("nothing", "there is no folder"),
    ],
)
def test_a_path_that_is_no_folder_is_told_from_one(folder, path, line):
    for name in ("model.gguf", "model.zip"):
        (folder / name).touch()
    with pytest.raises(UserError, match=line):
        resolve(ModelSpec("tiny", str(folder / path)))


# Dequantized on purpose


def test_fp8_is_scored_as_the_numbers_that_it_holds(folder):
    numbers = quantized_to_fp8(folder)
    resolved = before_weights(folder, dequantize=True)
    model = load(resolved, None, "cpu").model
    assert len(numbers) == 14
    for name, expected in numbers.items():
        assert torch.equal(model.get_parameter(name), expected), name
    (warning,) = resolved.warnings
    assert re.match("the checkpoint is quantized .fp8. and was dequantized", warning)


def test_what_transformers_cannot_dequantize_is_refused(folder):
    config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"})
    assert "model.dequantize=true works for fp8, mxfp8, mxfp4 alone" in refused(folder, dequantize=True)


def test_dequantizing_what_is_not_quantized_is_refused(folder):
    assert "is not quantized; leave model.dequantize out" in refused(folder, dequantize=True)


def test_mxfp4_experts_are_scored_as_the_numbers_that_they_hold(tmp_path):
    """gpt-oss: blocks of 32 numbers of four bits, two a byte, with an exponent each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    few = {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 384,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **few, pad_token_id=0)).bfloat16()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    expected, values = {}, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def change(held):
        for name in [n for n in held if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = held.pop(name).shape
            codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
            scales = torch.randint(120, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
            numbers = values[codes] * torch.exp2(scales.float() - 127)[..., None]
            expected[name] = numbers.reshape(experts, outputs, inputs).transpose(1, 2).bfloat16()
            held[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            held[f"{name}_scales"] = scales

    tensors(tmp_path, change)
    config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert "already quantized: mxfp4" in refused(tmp_path)
    model = load(before_weights(tmp_path, dequantize=True), None, "cpu").model
    assert len(expected) == 2
    for name, numbers in expected.items():
        assert torch.equal(model.get_parameter(name), numbers), name


def test_an_export_of_layerbits_is_not_dequantized(folder):
    exported(folder)
    assert "exported it as fp8_full from run abc123" in refused(folder, dequantize=True)


def test_the_run_that_made_a_quantized_checkpoint_is_named(folder):
    made = Experiment("exp", "export fp8", "def456", "http://h/#/experiments/1/runs/def456", "http://h")
    exported(folder)
    made.save(folder)
    assert "(config.json; made by run def456 (export fp8, experiment exp)); LayerBits exported it" in refused(folder)
    (folder / "layerbits.json").unlink()  # as ModelOpt's own scripts leave one
    assert "made by run def456 (export fp8, experiment exp)); give the checkpoint" in refused(folder)


# Code that comes along

_OWN = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.usefixtures("nobody_is_asked")
def test_trusted_code_is_run_and_nobody_is_asked(folder):
    (folder / "modeling_own.py").write_text(_OWN)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    assert "brings code of its own (modeling_own.py)" in refused(folder)
    model = load(before_weights(folder, trust_remote_code=True), None, "cpu")
    assert model.info.architecture == "OwnForCausalLM"
    assert len(model.linears) == 15


def test_code_beside_an_architecture_that_transformers_has_is_not_needed(folder):
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    before_weights(folder)


# Every kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_checkpoint_is_refused_in_one_line_before_its_weights_load(folder, kind):
    spoil, line = KINDS[kind]
    spoil(folder)
    said = refused(folder)
    assert re.search(line, said), said
