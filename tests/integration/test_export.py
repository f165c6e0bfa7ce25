"""Exports of tiny models: proven, refused where the label lies, and found out where a single number was changed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from layerbits import tracking
from layerbits.checkpoint import write_modelopt
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.structure import check_structure
from layerbits.errors import Unsupported, UserError
from layerbits.export import job as export_job
from layerbits.export import plan as export_plan
from layerbits.export import scheme as export
from layerbits.export.job import ExportSettings, run_exports
from layerbits.export.log import ExportLog
from layerbits.export.plan import plan_export
from layerbits.export.scheme import NotProven, export_scheme
from layerbits.inputs.captions import load_captions
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.jobs import Tracker
from layerbits.results.assignment import Assignment
from layerbits.results.experiment import made_by
from layerbits.results.result import Group
from layerbits.tracking.settings import TrackingSpec
from tests.families import build
from tools.docs import exports

from .entries import start
from .export_support import FILES, planned, prepared, saved, spoil
from .scoring_support import VOCABULARY, candidate

FP8 = candidate("wfp8_afp8")
EVERY = ("qkv", "o", "gate_up", "down")
LAYER = "model.layers.0.mlp.down_proj"


def everywhere(made):
    return dict.fromkeys(EVERY, made)


@pytest.mark.parametrize(
    ("kind", "pair", "overlay", "variant", "label"),
    [
        ("llama", "wfp8_afp8", "default", "mxfp4", "FP8"),
        ("llama", "wfp8_afp8", "recipe_match_channel_token", "mxfp4", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("llama", "wint8_aint8", "default", "mxfp4", "W8A8_SQ_PER_CHANNEL"),
        ("llama", "wint4_afp16", "w_group32", "mxfp4", "W4A16_AWQ"),
        ("llama", "wfp4_afp8", "default", "nvfp4", "W4A8_NVFP4_FP8"),
        ("qwen2_5_vl", "wfp8_afp8", "default", "mxfp4", "FP8"),
        ("qwen2_5_vl", "wint8_afp16", "default", "mxfp4", "W8A16"),
        ("qwen3_vl", "wfp4_afp8", "default", "mxfp4", "W4A8_MXFP4_FP8"),
        ("qwen3_vl", "wfp4_afp16", "default", "nvfp4", "W4A16_NVFP4"),
    ],
)
def test_an_export_is_what_was_scored(tmp_path, kind, pair, overlay, variant, label):
    plan = planned(kind, tmp_path, format="modelopt", **everywhere(candidate(pair, overlay, variant)))
    made = export_scheme(plan, "cpu")
    assert made.proof.passed
    assert made.proof.record.labels == {label: 14}
    # Bit for bit: weights in the model's dtype, and logits at the stored numbers.
    assert made.proof.logits.deviation == 0.0
    if "token" not in overlay:  # there, ties between two bfloat16 numbers may fall either way
        assert all(layer.identical == layer.elements for layer in made.proof.layers)
    assert [f.name for f in tmp_path.glob("exports/.*")] == []


@pytest.mark.parametrize("pair", ["wint8_afp16", "wint4_afp16"])
def test_weights_that_are_all_zero_export(tmp_path, pair):
    source = tmp_path / "source"
    model = saved("llama", source)
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3] = 0
        model.get_submodule(LAYER).weight[:, :128] = 0
    model.save_pretrained(source)
    plan = plan_export(prepared(model, source, down=candidate(pair)), tmp_path / "out")
    assert export_scheme(plan, "cpu").proof.passed


def test_float32_models_export_too(tmp_path):
    made = export_scheme(planned("llama", tmp_path, dtype=torch.float32, **everywhere(FP8)), "cpu")
    assert made.proof.passed
    assert made.proof.logits.deviation == 0.0


def test_vision_and_everything_else_stay_bit_for_bit(tmp_path):
    made = export_scheme(planned("qwen2_5_vl", tmp_path, down=FP8), "cpu")
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(made.folder / "model.safetensors")
    same = [n for n in before if n in after and before[n].dtype == after[n].dtype and torch.equal(before[n], after[n])]
    assert {n for n in before if "visual" in n} <= set(same)
    assert {n for n in before if n not in same} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert {name: (made.folder / name).read_text() for name in FILES} == FILES


def test_mixed_precision_is_labelled_layer_by_layer(tmp_path):
    assigned = {"qkv": FP8, "o": FP8, "down": candidate("wfp4_afp16", variant="nvfp4")}
    made = export_scheme(planned("qwen3_vl", tmp_path, **assigned), "cpu")
    config = json.loads((made.folder / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert made.proof.record.labels == {"FP8": 8, "W4A16_NVFP4": 2}


def test_fp8_kv_cache_has_calibrated_scales(tmp_path):
    made = export_scheme(planned("llama", tmp_path, kv_cache="fp8", **everywhere(FP8)), "cpu")
    scales = [n for n in open_checkpoint(made.folder).entries if n.endswith((".k_scale", ".v_scale"))]
    assert len(scales) == 4
    assert made.proof.record.kv_cache == "fp8"


def _changed(name, change):
    def spoiled(tensors, _labels):
        tensors[name] = change(tensors[name].clone())

    return spoiled


def _first(change):
    def changed(tensor):
        flat = tensor.reshape(-1)
        flat[0] = change(flat[0])
        return tensor

    return changed


def _next_step(value):
    return (value.view(torch.uint8) ^ 1).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed(f"{LAYER}.weight", _first(_next_step)), "1 of 32768 weights"),
        (_changed(f"{LAYER}.weight_scale", lambda s: s * 1.01), "are not the scored ones"),
        (_changed(f"{LAYER}.weight_scale", lambda s: s * 1.00001), "weight_scale is not its calibrated range / 448"),
        (_changed(f"{LAYER}.input_scale", lambda s: s * 1.001), "not its calibrated range / 448"),
        (_changed("model.norm.weight", _first(lambda v: v + 1)), "model.norm.weight is not the source's"),
        (lambda t, _: t.pop(f"{LAYER}.input_scale"), "has no input_scale"),
        (lambda t, _: t.pop("model.norm.weight"), "model.norm.weight is not in the export"),
        (lambda t, _: t.update(more=torch.ones(2)), "more is in the export alone"),
        (lambda _, c: c["quantization"].update(quant_algo="W8A16"), "config.json says FP8"),
        (_changed(f"{LAYER}.weight_scale", lambda s: -s), "zero, negative or not finite"),
        (_changed("model.layers.0.self_attn.q_proj.input_scale", lambda s: s * 2), "have different input_scale"),
    ],
)
def test_a_changed_number_is_found(tmp_path, monkeypatch, change, says):
    plan = planned("llama", tmp_path, **everywhere(FP8))
    spoil(monkeypatch, change)
    with pytest.raises(NotProven, match="not what was scored") as error:
        export_scheme(plan, "cpu")
    proof = json.loads((error.value.report / "proof.json").read_text())
    assert not proof["passed"]
    assert any(says in problem for problem in proof["problems"])
    assert "FAILED" in (error.value.report / "proof.md").read_text()
    assert not plan.target.exists()
    assert [f.name for f in plan.target.parent.iterdir()] == ["mine.report"]


def test_a_changed_block_scale_is_found(tmp_path, monkeypatch):
    plan = planned("llama", tmp_path, **everywhere(candidate("wfp4_afp16", variant="nvfp4")))
    spoil(monkeypatch, _changed(f"{LAYER}.weight_scale", _first(_next_step)))
    with pytest.raises(NotProven, match="are not the scored ones"):
        export_scheme(plan, "cpu")


def test_a_wrong_reading_of_the_activations_shows_in_the_logits(tmp_path, monkeypatch):
    from layerbits.checkpoint import restore

    plan = planned("llama", tmp_path, **everywhere(FP8))
    monkeypatch.setattr(restore, "quantize_input", lambda x, _label, _scale: x)
    with pytest.raises(NotProven, match="its logits differ"):
        export_scheme(plan, "cpu")


def test_the_bytes_of_another_scheme_are_no_export_of_this_one(tmp_path):
    first = export_scheme(planned("llama", tmp_path, down=FP8), "cpu")
    again = replace(planned("llama", tmp_path, down=FP8, target=tmp_path / "exports" / "two"))
    known = {"one": (first.proof.record.weights, "another recipe")}
    with pytest.raises(NotProven, match="are the bytes of one"):
        export_scheme(again, "cpu", known=known)
    assert export_scheme(again, "cpu", known=export.known_exports(tmp_path / "exports")).proof.passed


@pytest.mark.parametrize(
    ("pair", "overlay", "variant", "says"),
    [
        ("wint8_afp8", "default", "mxfp4", "W8A8_SQ_PER_CHANNEL"),
        ("wfp8_afp16", "default", "mxfp4", "label it FP8, which means FP8 per tensor x FP8 per tensor"),
        ("wint4_afp16", "w_per_out_channel", "mxfp4", "ModelOpt has no label for it"),
    ],
)
def test_a_label_that_lies_is_refused_before_loading(tmp_path, pair, overlay, variant, says):
    with pytest.raises(Unsupported, match=says):
        planned("llama", tmp_path, format="modelopt", down=candidate(pair, overlay, variant))


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    target = tmp_path / "exports" / "mine"
    target.mkdir(parents=True)
    (target / "here").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        planned("llama", tmp_path, down=FP8)


def test_too_little_disk_is_refused_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(export_plan.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"takes about .* GB free"):
        planned("llama", tmp_path, down=FP8)


def test_a_truncated_source_is_one_line(tmp_path):
    model = saved("llama", tmp_path)
    made = prepared(model, tmp_path, down=FP8)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"cannot load the weights of .* may be incomplete") as error:
        plan_export(made, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    plan = planned("llama", tmp_path, down=FP8)

    def full(_source, _folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_modelopt, "copy_files", full)
    with pytest.raises(UserError, match=r"No space left on device\); free space"):
        export_scheme(plan, "cpu")
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_tied_output_head_is_refused(tmp_path):
    source = tmp_path / "source"
    model = saved("llama", source, tie_word_embeddings=True)
    made = prepared(model, source, down=FP8)
    head = Group("lm_head", None, "lm_head", ("lm_head",), 1000)
    scheme = replace(
        made.scheme, groups=(*made.scheme.groups, head), assignment=Assignment([*made.scheme.assignment, FP8.info.name])
    )
    with pytest.raises(Unsupported, match=r"lm_head and model\.embed_tokens share one weight"):
        export_scheme(plan_export(replace(made, scheme=scheme), tmp_path / "out"), "cpu")


def cached(kind, folder, kv_cache="fp8"):
    """The plan of an export of one output of an attention, with an FP8 KV cache."""
    model = build(kind).bfloat16()
    model.save_pretrained(folder / "source")
    ready = prepared(model, folder / "source")
    made = candidate("wfp8_afp8", "recipe_match_channel_token").info
    linear = next(n for n, _ in model.named_modules() if n.endswith(("attn.o_proj", "attention.dense")))
    groups, names = (Group("B00.o", 0, "o", (linear,), 1000),), Assignment((made.name,))
    scheme = replace(ready.scheme, groups=groups, assignment=names, candidates=(made,), kv_cache=kv_cache)
    return plan_export(replace(ready, scheme=scheme), folder / "exports" / "mine", "modelopt")


def test_the_cache_of_an_attention_with_one_matrix_has_its_scales_where_vllm_looks(tmp_path):
    made = export_scheme(cached("phi3", tmp_path), "cpu")
    names = {n for n in load_file(made.folder / "model.safetensors") if n.endswith("_scale") and "self_attn" in n}
    assert {f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(2) for p in "kv"} <= names


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gpt_neox", "vLLM reads such scales of self_attn and mixer alone, not of attention"),
        ("deepseek_v3", "model.layers.0.self_attn: it has no keys and values of its own"),
        ("gemma3n_text", "model.layers.2.self_attn: it has no keys and values of its own"),
    ],
)
def test_a_cache_that_no_scale_can_be_read_of_is_refused_before_loading(kind, says, tmp_path):
    with pytest.raises(Unsupported, match=rf"{says}.*; use kv_cache=none"):
        cached(kind, tmp_path)
    cached(kind, tmp_path, "none")


def test_a_linear_attention_has_no_cache_to_quantize(tmp_path):
    made = export_scheme(cached("minimax", tmp_path), "cpu")
    scales = {n for n in load_file(made.folder / "model.safetensors") if n.endswith(("k_scale", "v_scale"))}
    assert scales == {f"model.layers.1.self_attn.{part}_proj.{part}_scale" for part in "kv"}


def test_a_truncated_export_is_one_line(tmp_path):
    made = export_scheme(planned("llama", tmp_path, down=FP8), "cpu")
    os.truncate(made.folder / "model.safetensors", 5000)
    with pytest.raises(UserError, match="is truncated"):
        check_structure(open_checkpoint(made.folder))


@pytest.mark.parametrize("name", exports.PAGES)
def test_the_page_has_the_current_table(name):
    text = (exports.DOCS / name).read_text(encoding="utf-8")
    assert exports.page(text, exports.PAGES[name]()) == text, "stale: python tools/docs/exports.py --write"


@pytest.fixture
def store(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    yield tracking.open_store(None, tmp_path)
    mlflow.set_tracking_uri(None)


def test_a_failed_proof_fails_its_run_and_leaves_its_report(tmp_path, monkeypatch, store):
    plan = planned("llama", tmp_path, down=FP8)
    spoil(monkeypatch, _changed(f"{LAYER}.weight_scale", lambda s: s * 2))
    settings = ExportSettings(None, tmp_path, "modelopt", "cpu", None, 1e9, True, None)
    log = ExportLog(settings, Tracker(TrackingSpec(True, store, "layerbits", None, False), tmp_path), tmp_path)
    with pytest.raises(NotProven):
        log(plan.scheme, lambda: export_scheme(plan, "cpu"))
    client = MlflowClient(store)
    (found,) = client.search_runs(["1"])
    assert found.info.status == "FAILED"
    assert "are not the scored ones" in found.data.tags["reason"]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"proof.md", "proof.json", "scheme.json"}
    assert not client.search_registered_models()


def run(script, *arguments):
    ended = start(script.removesuffix(".py"), *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended


def test_from_the_command_line_to_the_registry(tmp_path):
    """Run, artifacts, registered version, and what leads back from the checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    model = saved("llama", source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [old]\n---\nWords of its makers.\n")
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(f"w{i} w{2 * i} w{3 * i} w{i + 7}" for i in range(2, 60)) + "\n")
    scheme = prepared(model, source, **everywhere(FP8)).scheme
    captions = load_captions("text_file", "16", lines)
    data = replace(scheme.calibration, dataset="text_file", size="16", digest=captions.digest)
    settings = {
        "model": {"name": "tiny", "path": str(source)},
        "dataset": {"name": "text_file", "path": str(lines), "packing": "packed"},
    }
    scheme = replace(scheme, name="good", calibration=data, settings=settings)
    scheme.save(tmp_path / "good.json")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    wanted = [f"tracking.uri={store}", f"output_root={tmp_path}", "device=cpu", f"scheme_files={tmp_path}/good.json"]
    wanted += ["register=true", f"export_root={tmp_path}/exports"]

    refused = start("export", *wanted, "registered_model=team/llama")
    assert refused.returncode == 2
    assert "registered_model=team/llama is no name of a registered model" in refused.stderr
    assert not (tmp_path / "exports").exists()

    done = run("export.py", *wanted)
    client = MlflowClient(store)
    runs = client.search_runs(["1"], "tags.`layerbits.kind` = 'export'")
    assert len(runs) == 1, done.stderr
    assert "good: proven; FP8 x 14; 9 bits" in done.stdout
    said = [line.partition(":")[0] for line in done.stderr.replace("\r", "\n").splitlines() if " INFO " not in line]
    assert set(said) - {""} == {"calibrating"}  # and nothing of ModelOpt or transformers
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "exports").rglob("*.safetensors")}
    assert modes == {"0o644"}, "a server of another user could not read it"
    data = runs[0].data
    assert data.tags["outcome"] == "ok"
    assert data.tags["source_run_id"] == "run"
    assert data.metrics["proof/problems"] == 0.0
    assert data.metrics["proof/logit_deviation"] == 0.0
    names = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    assert {"proof.md", "proof.json", "scheme.json", "checkpoint.json", "checkpoint"} <= names
    with pytest.raises(
        UserError, match=r"already quantized: FP8.*by modelopt.*exported it as good from run run; score"
    ):
        resolve(ModelSpec("again", data.tags["checkpoint.path"]))
    version = client.search_model_versions("name = 'tiny'")[0]
    assert version.run_id == runs[0].info.run_id
    assert version.tags["scheme"] == "good"
    assert float(version.tags["effective_bits"]) == scheme.effective_bits

    (known,) = client.search_logged_models(["1"], "metrics.gib < 1", order_by=[{"field_name": "metrics.bits"}])
    numbers = {metric.key: metric.value for metric in known.metrics}
    assert (known.name, known.tags["checkpoint.path"]) == ("good wfp8_afp8 tiny", data.tags["checkpoint.path"])
    assert (known.source_run_id, known.model_type) == (runs[0].info.run_id, "scheme")
    assert numbers["gib"] * 2**30 == data.metrics["export/bytes"] == numbers["export/bytes"]
    assert (numbers["bits"], numbers["predicted_kl"]) == (scheme.effective_bits, scheme.predicted_kl)
    on_rows = {metric.key: metric.dataset_name for metric in known.metrics if metric.dataset_name}
    on_captions = ("proof/kl_scheme", "proof/kl_checkpoint", "predicted_kl", "summary/predicted_kl")
    assert on_rows == dict.fromkeys(on_captions, "text_file-16")
    assert known.tags["mlflow.model.isExternal"] == "true"
    assert client.search_logged_models(["1"], "metrics.gib < 0.0000001") == []

    card = (Path(data.tags["checkpoint.path"]) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("tiny", "quantized")
    assert (front["library_name"], front["license"]) == ("transformers", "apache-2.0")
    assert front["tags"] == ["quantized", "modelopt", "fp8", "layerbits"]
    assert "| qkv | wfp8_afp8 | 2 | 6 |" in card
    assert "14 quantized linears are what was scored" in card
    assert f"{data.metrics['proof/kl_checkpoint']:.4g}" in card
    assert (Path(data.tags["checkpoint.path"]) / "README.base_model.md").read_text().endswith("Words of its makers.\n")

    made = made_by(Path(data.tags["checkpoint.path"]))
    assert (made.run_id, made.experiment) == (runs[0].info.run_id, "layerbits")

    assert "good is exported and proven already" in run("export.py", *wanted).stdout
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    client.delete_run(runs[0].info.run_id)  # now there is a checkpoint on disk that no run has
    run("export.py", *wanted)
    (logged,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'export' and tags.outcome = 'ok'")
    assert logged.data.metrics["proof/problems"] == 0.0
    assert logged.info.run_id in {v.run_id for v in client.search_model_versions("name = 'tiny'")}
    parents = client.search_runs(["1"], "tags.`layerbits.kind` = 'exports'")
    assert [run.data.tags["outcome"] for run in parents] == ["ok", "ok", "ok"]


def test_a_scheme_that_quantizes_nothing_does_not_keep_others_from_being_exported(tmp_path, capsys, monkeypatch):
    some = planned("llama", tmp_path, qkv=FP8).scheme
    nothing = replace(some, name="nothing", assignment=Assignment([None] * len(some.assignment)), candidates=())
    settings = ExportSettings(tmp_path / "exports", tmp_path, "auto", "cpu", None, 0, False, None)

    def exported(*schemes):
        given = []

        def plan(schemes, *_rest):
            given.extend(schemes)
            raise UserError("enough")

        monkeypatch.setattr(export_job, "plan_exports", plan)
        with pytest.raises(UserError, match="enough"):
            run_exports(schemes, settings, lambda *_: None)
        return [scheme.name for scheme in given]

    assert exported(nothing, some) == ["mine"]
    assert "nothing quantizes nothing and has no checkpoint" in capsys.readouterr().out
    assert exported(nothing) == ["nothing"]  # alone it is refused when it is planned
