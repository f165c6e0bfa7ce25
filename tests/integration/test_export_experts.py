"""Exports of schemes on experts: a linear for each expert, proven."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors import safe_open

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.errors import Unsupported
from layerbits.export import job, scheme
from layerbits.export.plan import plan_export
from layerbits.export.scheme import NotProven, export_scheme
from layerbits.export.target import refused
from layerbits.inputs.experts import named_experts
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.probing.loading import Prepared
from layerbits.results.assignment import Assignment
from layerbits.results.result import Group
from layerbits.schemes import Scheme
from tests.families import build

from .export_support import saved, spoil, spoil_files
from .schemes_support import CALIBRATION, DATA, INFO
from .scoring_support import candidate


def planned(kind, folder, made, format="auto", module=None, other=None):
    """An export of a tiny mixture's second expert module, and of its first attention's output.

    Args:
        kind: Of the model. folder: Where to. made: The candidate. format: Of the export.
        module: In the place of the expert module.
        other: The candidate of the attention's output, where it is another one.
    """
    source = folder / "source"
    model = saved_family(kind, source) if kind in FAMILIES_ALONE else saved(kind, source)
    module = module or list(named_experts(model))[-1]
    linear = next(n for n, _ in model.named_modules() if n.endswith(("self_attn.o_proj", "mixer.o_proj")))
    groups = (Group("B00.o", 0, "o", (linear,), 1000), Group("B01.experts", 1, "other", (module,), 1000))
    used = (other or made).info, made.info
    names, used = tuple(info.name for info in used), tuple({info.name: info for info in used}.values())
    scheme = Scheme("mine", ("run",), INFO, DATA, groups, used, Assignment(names), 9.0, None, 0.01, 1e-6, {})
    resolved = resolve(ModelSpec("tiny", str(source)))
    scheme = replace(scheme, model=replace(scheme.model, revision=resolved.revision, dtype="bfloat16"))
    prepared = Prepared(scheme, resolved, None, None, CALIBRATION)
    return plan_export(prepared, folder / "exports" / "mine", format)


FAMILIES_ALONE = ("qwen3_5_moe", "nemotron_h")
"""Taken from the families of ``docs/models.md``."""


def saved_family(kind, folder):
    model = build(kind).bfloat16()
    model.save_pretrained(folder)
    return model


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


FOUR = QuantPair("wfp4_afp4", "fp4", "fp4", "NVFP4_DEFAULT_CFG")


@pytest.mark.parametrize(
    ("kind", "pair", "overlay", "variant", "label"),
    [
        ("qwen3_moe", "wfp8_afp8", "default", "mxfp4", "FP8"),
        ("qwen3_moe", "wfp4_afp16", "default", "nvfp4", "W4A16_NVFP4"),
        ("qwen3_moe", FOUR, "default", "nvfp4", "NVFP4"),
        ("qwen3_moe", "wfp8_afp8", "recipe_match_channel_token", "mxfp4", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("mixtral", "wfp8_afp8", "default", "mxfp4", "FP8"),
        ("qwen3_vl_moe", "wfp8_afp8", "default", "mxfp4", "FP8"),
    ],
)
def test_every_expert_is_proven(kind, pair, overlay, variant, label, tmp_path):
    scored = resolve_candidate(pair, Overlay("default", {})) if pair is FOUR else candidate(pair, overlay, variant)
    made = export_scheme(planned(kind, tmp_path, scored), "cpu")
    assert made.proof.passed
    assert made.proof.record.labels == {label: 1 + 4 * 3}
    assert made.proof.logits.deviation_ratio < 0.01
    assert all(layer.worst <= 1 for layer in made.proof.layers)
    stored = tensors(made.folder)
    leaf = "w1" if kind == "mixtral" else "gate_proj"
    (name,) = [n for n in stored if n.endswith(f"experts.3.{leaf}.weight") and ".1." in n]
    assert f"{name}_scale" in stored


FP8, TOKENS = candidate("wfp8_afp8"), candidate("wfp8_afp8", "recipe_match_channel_token")


def said(folder):
    """The lists of both configurations, which have to agree."""
    details = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config.get("quantized_layers") == details.get("quantized_layers")
    assert config.get("ignore", []) == details.get("exclude_modules", [])
    return config


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen3_vl_moe", "nemotron_h"])
def test_experts_beside_another_label_are_listed_by_the_names_of_the_files(kind, tmp_path):
    made = export_scheme(planned(kind, tmp_path, FP8, other=TOKENS), "cpu")
    config = said(made.folder)
    assert config["quant_algo"] == "MIXED_PRECISION"
    packed = {n.removesuffix(".weight") for n, t in tensors(made.folder).items() if t.dtype == torch.float8_e4m3fn}
    assert set(config["quantized_layers"]) == packed
    assert {t for group in config["config_groups"].values() for t in group["targets"]} == packed


@pytest.mark.parametrize("other", [FP8, TOKENS], ids=["one label", "two"])
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "nemotron_h"])
def test_routed_experts_left_alone_beside_a_quantized_shared_one_are_excluded(kind, other, tmp_path):
    shared = (
        "model.language_model.layers.1.mlp.shared_expert"
        if kind == "qwen3_5_moe"
        else "model.layers.2.mixer.shared_experts"
    )
    made = export_scheme(planned(kind, tmp_path, FP8, "modelopt", f"{shared}.down_proj", other), "cpu")
    config = said(made.folder)
    routed = [n for n in tensors(made.folder) if ".experts." in n]
    assert routed
    assert all(any(fnmatchcase(name, pattern) for pattern in config["ignore"]) for name in routed)
    assert len(config.get("quantized_layers", ())) == (0 if other is FP8 else 2)


def test_experts_that_a_runtime_takes_for_quantized_are_found(tmp_path, monkeypatch):
    module = "model.language_model.layers.1.mlp.shared_expert.down_proj"
    plan = planned("qwen3_5_moe", tmp_path, FP8, "modelopt", module, TOKENS)

    def change(folder):
        for file, key in (("config.json", "ignore"), ("hf_quant_config.json", "exclude_modules")):
            config = json.loads((folder / file).read_text())
            config["quantization_config" if file == "config.json" else "quantization"][key] = []
            (folder / file).write_text(json.dumps(config))

    spoil_files(monkeypatch, change)
    words = r"layers\.1\.mlp\.experts is not quantized and not excluded: vLLM takes it for FP8"
    with pytest.raises(NotProven, match=words):
        export_scheme(plan, "cpu")


@pytest.mark.parametrize("other", [TOKENS, FP8], ids=["alone", "in a mix"])
def test_a_label_that_vllm_has_not_for_experts_is_said(other, tmp_path):
    *_, line = refused(planned("qwen3_moe", tmp_path, TOKENS, other=other))
    assert "refuses routed experts under FP8_PER_CHANNEL_PER_TOKEN (model.layers.1.mlp.experts)" in line
    assert refused(planned("qwen3_moe", tmp_path / "other", FP8)) == []


def test_a_mix_that_vllm_reads_wrongly_is_said_where_no_other_format_has_the_model(tmp_path):
    (line,) = refused(planned("qwen3_moe", tmp_path, FP8, other=TOKENS))
    assert "vLLM 0.26.0 takes linears under FP8_PER_CHANNEL_PER_TOKEN for unquantized beside other labels" in line


def test_what_vllm_refuses_is_a_warning_before_the_export(tmp_path, capsys, monkeypatch):
    plan = planned("qwen3_moe", tmp_path, TOKENS)
    monkeypatch.setattr(job, "plan_exports", lambda *_: ([plan], {}))
    monkeypatch.setattr(scheme, "shared_ranges", lambda *_: None)
    settings = job.ExportSettings(tmp_path / "exports", tmp_path, "auto", "cpu", None, 0, False, None)
    job.run_exports([plan.scheme], settings, lambda *_: None)
    assert "warning: mine: vLLM refuses routed experts under FP8_PER_CHANNEL_PER_TOKEN" in capsys.readouterr().out


def test_a_changed_expert_is_found(tmp_path, monkeypatch):
    def change(stored, _labels):
        weight = stored["model.layers.1.mlp.experts.2.up_proj.weight"]
        weight.view(torch.uint8)[5, 7] ^= 1

    plan = planned("qwen3_moe", tmp_path, candidate("wfp8_afp8"))
    spoil(monkeypatch, change)
    with pytest.raises(NotProven, match=r"1 of 16384 weights of model\.layers\.1\.mlp\.experts\.2\.up_proj"):
        export_scheme(plan, "cpu")


def test_experts_left_alone_are_compared_too(tmp_path, monkeypatch):
    plan = planned("qwen3_vl_moe", tmp_path, candidate("wfp8_afp8"))
    name = "model.language_model.layers.0.mlp.experts.1.down_proj.weight"

    def change(stored, _labels):
        stored[name][0, 0] += 1

    spoil(monkeypatch, change)
    with pytest.raises(NotProven, match=f"{name} is not the source's"):
        export_scheme(plan, "cpu")


def test_experts_left_alone_keep_a_model_out_of_compressed_tensors(tmp_path):
    output = "model.layers.1.self_attn.o_proj"
    with pytest.raises(Unsupported, match="holds experts, which ModelOpt's format alone has; use format=modelopt"):
        planned("qwen3_moe", tmp_path, FP8, "compressed-tensors", output)
    plan = planned("qwen3_moe", tmp_path / "auto", TOKENS, "auto", output, FP8)
    assert plan.format == "modelopt"  # the mix would be one of compressed-tensors for a model without experts
    with pytest.raises(Unsupported, match=r"only ModelOpt's format has experts, which model\.layers\.0\.mlp\.experts"):
        planned("qwen3_moe", tmp_path / "int8", candidate("wint8_aint8", "recipe_match_channel_token"), "auto", output)


@pytest.mark.parametrize(
    ("pair", "format", "words"),
    [("wint4_afp16", "modelopt", "is not proven for experts"), ("wfp8_afp8", "compressed-tensors", "format=modelopt")],
)
def test_what_is_not_proven_for_experts_is_refused(pair, format, words, tmp_path):
    with pytest.raises(Unsupported, match=words):
        planned("qwen3_moe", tmp_path, candidate(pair), format)


def test_the_export_names_its_experts_in_the_configuration(tmp_path):
    made = export_scheme(planned("qwen3_moe", tmp_path, candidate("wfp8_afp8")), "cpu")
    details = json.loads((made.folder / "hf_quant_config.json").read_text())["quantization"]
    assert details["quant_algo"] == "FP8"
    assert "model.layers.0.mlp*" in details["exclude_modules"] or any(
        name.startswith("model.layers.0.mlp") for name in details["exclude_modules"]
    )
