"""What an export keeps of its source beside the weights: configuration, code, templates, multi-token prediction."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from layerbits.checkpoint.compare import compare_excluded
from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.restore import restore
from layerbits.config import Settings
from layerbits.errors import Unsupported, UserError
from layerbits.export import job as export_job
from layerbits.export.job import ExportSettings, run_exports
from layerbits.export.plan import plan_export
from layerbits.export.scheme import NotProven, export_scheme
from layerbits.inputs.loading import empty_model, load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.inputs.prediction_layers import prediction_module
from layerbits.inputs.ties import tied_linears
from layerbits.probing.loading import Prepared
from layerbits.results.assignment import Assignment
from layerbits.schemes import Scheme
from layerbits.scoring.groups import named_groups
from layerbits.scoring.state import decisions
from layerbits.stages.workbench import workbench
from tests.families import build

from .checkpoint_support import config, save_tokenizer, sharded, tensors
from .export_support import prepared, saved, spoil_files
from .schemes_support import CALIBRATION, DATA, INFO
from .scoring_support import CONFIGS, candidate, loaded, tiny_model

FP8 = candidate("wfp8_afp8")
FORMATS = ("modelopt", "compressed-tensors")
both_formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    saved("llama", folder)
    return folder


def exported(source, format, model=None, **spec):
    """Half of the model in FP8, proven."""
    model = model or tiny_model("llama").bfloat16()
    ready = prepared(model, source, down=FP8, qkv0=FP8)
    resolved = resolve(ModelSpec("tiny", str(source), **spec))
    ready = replace(ready, resolved=resolved, scheme=replace(ready.scheme, model=replace(ready.scheme.model)))
    made = export_scheme(plan_export(ready, source.parent / f"made-{format}", format), "cpu")
    assert made.proof.passed
    return made


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# Configuration


def older(folder, **more):
    """``config.json`` as version 4 of transformers writes it."""
    config(folder, "rope_parameters", "dtype", **more)
    config(folder, rope_theta=500_000.0, torch_dtype="bfloat16", sliding_window=None, use_cache=True)


@both_formats
def test_keys_of_older_runtimes_stay(source, format):
    rope = {"rope_type": "linear", "factor": 2.0}
    older(source, rope_scaling=rope, _from_a_fork={"nested": [1, 2]})
    made = exported(source, format)
    ours, theirs = read(made.folder), read(source)
    own = ours.pop("quantization_config")
    assert own["quant_method"] in (format, "modelopt")
    assert ours.pop("dtype") == "bfloat16"
    assert ours == theirs
    assert (ours["rope_theta"], ours["rope_scaling"], ours["torch_dtype"]) == (500_000.0, rope, "bfloat16")
    assert made.proof.config.same == len(theirs) + 1  # rope_scaling counts as its two keys
    assert [words.partition(":")[0] for words in made.proof.config.changed] == ["dtype", "quantization_config"]
    assert 'dtype: absent in the source, "bfloat16" in the export' in made.proof.markdown()


@both_formats
def test_text_keys_of_an_older_vision_model_stay_where_they_are(tmp_path, format):
    source = tmp_path / "source"
    model = saved("qwen2_5_vl", source)
    said = read(source)
    text = said.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("dtype", None)
    flat = {**text, **said, "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["model_type"] = "qwen2_5_vl"
    flat.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(flat))
    made = exported(source, format, model)
    ours = read(made.folder)
    assert {k: v for k, v in ours.items() if k not in ("quantization_config", "dtype")} == flat
    assert "text_config" not in ours


@both_formats
def test_another_dtype_is_said_in_every_key(source, format):
    older(source)
    made = exported(source, format, tiny_model("llama"), dtype="float32")
    assert (read(made.folder)["dtype"], read(made.folder)["torch_dtype"]) == ("float32", "float32")
    assert 'torch_dtype: "bfloat16" in the source, "float32" in the export' in made.proof.config.changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda said: said.update(rope_theta=1e4), "rope_theta: 500000.0 in the source, 10000.0 in the export"),
        (lambda said: said.pop("vocab_size"), "vocab_size: 384 in the source, absent in the export"),
        (lambda said: said.update(mlp_bias=True), "mlp_bias: false in the source, true in the export"),
        (lambda said: said.update(torch_dtype="float16"), 'torch_dtype: "bfloat16" in the source, "float16"'),
    ],
)
def test_a_changed_configuration_is_not_proven(source, monkeypatch, change, says):
    older(source)

    def spoiled(folder):
        said = read(folder)
        change(said)
        (folder / "config.json").write_text(json.dumps(said))

    spoil_files(monkeypatch, spoiled)
    with pytest.raises(NotProven, match=f"config.json is not the source's: {says}"):
        exported(source, "compressed-tensors")


@both_formats
def test_a_generation_config_that_transformers_does_not_save_is_kept(source, format):
    text = '{"temperature": 0.6, "top_p": 0.9,\n "do_sample": false}'
    (source / "generation_config.json").write_text(text)
    assert (exported(source, format).folder / "generation_config.json").read_text() == text


@both_formats
def test_no_generation_config_is_made_up(source, format):
    (source / "generation_config.json").unlink(missing_ok=True)
    assert not (exported(source, format).folder / "generation_config.json").exists()


# Files


@both_formats
def test_what_training_left_stays_and_templates_come_along(source, format):
    left = ("last.ckpt", "events.out.tfevents.1.host", "trainer_state.json", "training_args.bin", "optimizer.pt")
    left += ("rng_state_0.pth", "all_results.json", "scheduler.pt", "zero_to_fp32.py", "latest", "run.log")
    came = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "NOTICE", "vocab.txt", "README.md")
    (source / "additional_chat_templates").mkdir()
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5" / "chat_template.jinja").write_text("x")
    for name in (*left, *came):
        (source / name).write_text("{}")
    made = exported(source, format)
    files = {str(file.relative_to(made.folder)) for file in made.folder.rglob("*") if file.is_file()}
    assert files >= {*came, "LICENSE", "preprocessor_config.json", "tokenizer_config.json"}
    assert not files & {*left, "checkpoint-5/chat_template.jinja"}
    assert {*read(made.report, "checkpoint.json")["files"]} == files - {"layerbits.json"} | {"layerbits.json"}


_OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

from .parts_own import SCALE


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
"""


@both_formats
@pytest.mark.usefixtures("nobody_is_asked")
def test_a_model_with_its_own_code_is_exported_and_proven(source, format):
    (source / "modeling_own.py").write_text(_OWN)
    (source / "parts_own.py").write_text("SCALE = 0.5\n")
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config(source, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    with pytest.raises(UserError, match=r"brings code of its own .modeling_own.py"):
        resolve(ModelSpec("tiny", str(source)))
    ready = prepared_own(source)
    made = export_scheme(plan_export(ready, source.parent / "made", format), "cpu")
    assert made.proof.passed
    assert made.proof.logits.deviation == 0.0
    assert (made.folder / "modeling_own.py").read_text() == _OWN
    assert (made.folder / "parts_own.py").is_file()
    assert read(made.folder)["auto_map"] == code
    again = open_checkpoint(made.folder)
    assert type(restore(again, read_quantization(again), "cpu", trusted=True)).__name__ == "OwnForCausalLM"


def prepared_own(source):
    resolved = resolve(ModelSpec("tiny", str(source), trust_remote_code=True))
    ready = prepared_with(resolved, tiny_model("llama").bfloat16())
    return replace(ready, scheme=replace(ready.scheme, model=replace(ready.scheme.model, revision=resolved.revision)))


def prepared_with(resolved, model):
    from .schemes_support import scheme_of

    scheme = scheme_of(model, "mine", down=FP8, qkv0=FP8)
    return Prepared(replace(scheme, model=replace(scheme.model, dtype="bfloat16")), resolved, None, None, CALIBRATION)


# Multi-token prediction


def ahead(prefix, size=128):
    """Tensors of a module for multi-token prediction."""
    torch.manual_seed(1)
    shapes = {"eh_proj": (size, 2 * size), "mlp.down_proj": (size, size), "enorm": (size,)}
    return {f"{prefix}.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}


@both_formats
@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("mtp", "mtp_num_hidden_layers"),
        ("model.mtp_block.0", "num_mtp"),
        ("model.layers.2", "num_nextn_predict_layers"),
    ],
)
def test_layers_for_multi_token_prediction_are_carried(source, format, prefix, key):
    more = ahead(prefix)
    tensors(source, lambda held: held.update(more))
    config(source, **{key: 1})
    made = exported(source, format)
    again = open_checkpoint(made.folder)
    assert all(torch.equal(again.rows(name), tensor) for name, tensor in more.items())
    quantization = read_quantization(again)
    modules = [name.removesuffix(".weight") for name in more]
    assert all(any(quantization.matches(m, p) for p in quantization.exclude) for m in modules)
    assert read(made.folder)[key] == 1
    assert made.proof.excluded.unused == ()


def test_shards_get_more_shards(source):
    sharded(source)
    more = ahead("mtp")
    file = source / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    index = read(source, "model.safetensors.index.json")
    index["weight_map"] |= dict.fromkeys(more, file.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    made = exported(source, "modelopt")
    assert sorted(f.name for f in made.folder.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    where = read(made.folder, "model.safetensors.index.json")["weight_map"]
    assert {where[name] for name in more} == {"model-00002-of-00002.safetensors"}


def test_a_lost_layer_for_multi_token_prediction_is_found(source):
    tensors(source, lambda held: held.update(ahead("mtp")))
    made = exported(source, "compressed-tensors")
    whole, theirs = open_checkpoint(made.folder), open_checkpoint(source)
    entries = {name: entry for name, entry in whole.entries.items() if name != "mtp.enorm.weight"}
    known = dict.fromkeys(theirs.entries, "x") | {"mtp.enorm.weight": "mtp.enorm.weight"}
    found = compare_excluded(replace(whole, entries=entries), theirs, [], known)
    assert "mtp.enorm.weight is not in the export" in found.problems


@pytest.mark.parametrize("depth", [2, 3])
def test_deepseeks_layout_is_taken_at_any_depth(tmp_path, depth):
    """transformers knows the number of DeepSeek-V3's own last layer alone."""
    import transformers as hf

    small = build("deepseek_v3").config.to_dict() | {"num_hidden_layers": depth, "num_nextn_predict_layers": 1}
    hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**small)).bfloat16().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    more = ahead(f"model.layers.{depth}") | ahead(f"model.layers.{depth}.mlp.experts.0")
    tensors(tmp_path, lambda held: held.update(more))
    resolved = resolve(ModelSpec("tiny", str(tmp_path)))
    empty_model(resolved)
    assert load(resolved, None, "cpu").model.config.num_hidden_layers == depth
    beyond = {f"model.layers.{depth + 1}.enorm.weight": torch.ones(128)}
    tensors(tmp_path, lambda held: held.update(beyond))
    with pytest.raises(UserError, match=rf"does not use .model.layers.{depth + 1}.enorm.weight"):
        empty_model(resolved)


def test_an_experts_export_carries_them_too(tmp_path):
    source = tmp_path / "source"
    model = saved("qwen3_moe", source)
    more = ahead("mtp")
    tensors(source, lambda held: held.update(more))
    made = exported(source, "modelopt", model)
    assert all(torch.equal(open_checkpoint(made.folder).rows(name), tensor) for name, tensor in more.items())


def test_what_is_no_multi_token_prediction_is_none():
    found = tiny_model("llama").config
    names = ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight", "mtp")
    assert [prediction_module(name, found) for name in names] == [None] * 4


# Ties


def test_a_head_of_its_own_that_the_config_ties_is_told_before_scoring(source):
    config(source, tie_word_embeddings=True)
    resolved = resolve(ModelSpec("tiny", str(source)))
    with pytest.raises(UserError, match=r"has lm_head.weight and model.embed_tokens.weight as two tensors .*tie_word"):
        empty_model(resolved)
    with pytest.raises(UserError, match=r"lm_head.weight and model.embed_tokens.weight as two tensors"):
        load(resolved, None, "cpu")  # as of a model on the hub
    held = load_file(source / "model.safetensors")
    torch.save(held, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lm_head.weight and model.embed_tokens.weight as two tensors"):
        load(resolve(ModelSpec("tiny", str(source))), None, "cpu")


def test_a_tied_head_that_is_stored_twice_is_one(source):
    tensors(source, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    config(source, tie_word_embeddings=True)
    resolved = resolve(ModelSpec("tiny", str(source)))
    empty_model(resolved)
    load(resolved, None, "cpu")


@pytest.fixture(scope="module")
def tied_blocks():
    """Zamba2: its attention blocks are one, in two places."""
    import transformers as hf

    torch.manual_seed(0)
    made = hf.Zamba2Config(
        vocab_size=384, hidden_size=128, num_hidden_layers=4, mamba_d_state=16, n_mamba_heads=4, mamba_headdim=64,
        mamba_ngroups=1, num_attention_heads=4, num_key_value_heads=4, attention_head_dim=64, intermediate_size=256,
        layers_block_type=["hybrid", "mamba", "hybrid", "mamba"], num_mem_blocks=1, pad_token_id=0,
        use_shared_attention_adapter=False, adapter_rank=8, chunk_size=16,
    )  # fmt: skip
    return hf.Zamba2ForCausalLM(made).float().eval()


def test_tied_blocks_are_named_before_scoring(tied_blocks):
    head, note = tied_linears(tied_blocks, loaded(tied_blocks).linears)
    assert head.startswith("lm_head is model.embed_tokens, one tensor")
    assert re.match(r"model\.layers\.0\..*, model\.layers\.2\..* are one tensor in 2 places .*model.exclude", note), (
        note
    )
    assert tied_linears(tiny_model("llama"), loaded(tiny_model("llama")).linears) == []


def test_a_tied_head_is_named_before_scoring():
    model = tiny_model("llama", tie_word_embeddings=True)
    assert tied_linears(model, ["model.layers.0.mlp.down_proj"]) == []
    (note,) = tied_linears(model, ["lm_head"])
    assert note.startswith("lm_head is model.embed_tokens, one tensor")


@pytest.mark.parametrize("scored", [False, True])
def test_a_run_names_a_tied_head_only_where_it_is_scored(scored):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("sensitivity", [f"model.lm_head={scored}"])
    bench = workbench(Settings.from_config(OmegaConf.to_container(composed, resolve=True)))
    capability = bench.check(FP8)
    warnings = bench.plan([(FP8, capability)]).warnings(capability)
    assert any("lm_head is model.embed_tokens, one tensor" in line for line in warnings) == scored


def test_an_export_of_one_of_two_tied_blocks_names_both(tied_blocks, tmp_path):
    tied_blocks.save_pretrained(tmp_path / "source")
    resolved = resolve(ModelSpec("tiny", str(tmp_path / "source")))
    found = loaded(tied_blocks)
    named = named_groups(found.model, [(d.modules, d.weights) for d in decisions(found.model, [])], "lm_head")
    groups = tuple(g for g in named if any("shared_transformer" in m and "down_proj" in m for m in g.modules))
    chosen = Assignment(FP8.info.name for _ in groups)
    info = replace(INFO, revision=resolved.revision)
    scheme = Scheme("t", ("r",), info, DATA, groups, (FP8.info,), chosen, 9.0, None, 0.0, 0.0, {"method": "budget"})
    plan = plan_export(Prepared(scheme, resolved, None, None, CALIBRATION), tmp_path / "out", "compressed-tensors")
    with pytest.raises(Unsupported, match=r"layers\.0\..*down_proj and .*layers\.2\..*down_proj share one weight"):
        export_scheme(plan, "cpu")


# Several schemes


def test_one_scheme_that_fails_leaves_the_others(source, monkeypatch, capsys):
    model = tiny_model("llama").bfloat16()
    ready = prepared(model, source, "lies", down=candidate("wfp8_aint8"))
    schemes = [
        ready.scheme,
        *(replace(prepared(model, source, name, down=FP8).scheme) for name in ("breaks", "refused", "good")),
    ]
    monkeypatch.setattr("layerbits.probing.loading.prepare_together", lambda *_: ready)
    done = []

    def each(scheme, run):
        if scheme.name == "breaks":
            raise ValueError("a library's own words\nin two lines")
        if scheme.name == "refused":
            raise UserError("one line")
        done.append(run())

    settings = ExportSettings(source.parent / "exports", source.parent, "modelopt", "cpu", None, 0, False, None)
    with pytest.raises(UserError, match=r"3 of 4 exports failed: .*ModelOpt would label it"):
        export_job.run_exports(schemes, settings, each)
    assert [made.scheme.name for made in done] == ["good"]
    assert done[0].proof.passed
    out = capsys.readouterr().out
    assert "lies FAILED: " in out
    assert "breaks FAILED: ValueError: a library's own words\n" in out
    assert "refused FAILED: one line" in out


def test_one_refused_scheme_is_told_in_its_own_words(source, monkeypatch):
    ready = prepared(tiny_model("llama").bfloat16(), source, "lies", down=candidate("wfp8_aint8"))
    monkeypatch.setattr("layerbits.probing.loading.prepare_together", lambda *_: ready)
    settings = ExportSettings(source.parent / "exports", source.parent, "modelopt", "cpu", None, 0, False, None)
    with pytest.raises(UserError, match=r"cannot be exported as modelopt.*stays available"):
        run_exports([ready.scheme], settings, lambda *_: pytest.fail("exported"))
