"""Files of earlier tools as results: what is read, what stays unknown, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from layerbits import importing
from layerbits.errors import UserError
from layerbits.importing.convert import PRESETS
from layerbits.results.manifest import load_manifest
from layerbits.tracking import contract

PUBLISHED = Path(__file__).parents[3] / "shared" / "reference" / "published"
LEAVES = {"self_attn.q_proj": 2e-4, "self_attn.o_proj": 1e-4, "mlp.gate_proj": 0.5, "mlp.down_proj": 0.25}
FUSED = ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
MODEL = "/elsewhere/checkpoints/Tiny-VL-1B-Instruct"


def scores(prefix="model.language_model", blocks=2):
    """Module → raw score; the later the block the smaller."""
    return {f"{prefix}.layers.{b}.{leaf}": value / (b + 1) for b in range(blocks) for leaf, value in LEAVES.items()}


def head(name="wint8_afp16_autoquant_lm", formats=("INT8_WEIGHT_ONLY_CFG",), dataset=None):
    data = {
        "scheme": {
            "name": name,
            "auto_quantize_bits": 8.5,
            "auto_quantize_method": "gradient",
            "auto_quantize_score_size": 64,
            "quant_formats": list(formats),
        },
        "model": {"id": MODEL},
        "autoquant_state": {"constraints": {"effective_bits": 8.25}, "score": 0.75},
    }
    return data | ({"dataset": dataset} if dataset else {})


def entry(forms, score, weights=800):
    """A group of a quant manifest: format (and bits) → score, and the unquantized one."""
    names = [f"{form}(effective-bits: {bits})" for form, bits in forms] + ["NONE(effective-bits: 16.0)"]
    costs = [weights * bits / 16 for _, bits in forms] + [float(weights)]
    values = score if isinstance(score, list) else [score] * len(forms)
    return {"formats": names, "scores": [*values, 0.0], "costs": costs, "importance": 1.0, "rank": 1}


def manifest(forms=(("INT8_WEIGHT_ONLY_CFG", 8.0),), **changes):
    found = scores()
    layers = {f"{m}.quant_recipe": entry(forms, s if len(forms) == 1 else [s, 2 * s]) for m, s in found.items()}
    layers["model.visual.blocks.0.attn.qkv.quant_recipe"] = entry((), 0.0)
    layers["lm_head.quant_recipe"] = entry(forms, 0.125 if len(forms) == 1 else [0.125, 0.25])
    modules = [*found, *(f"model.language_model.layers.{b}.{leaf}" for b in range(2) for leaf in FUSED), "lm_head"]
    named = {"layers": {name: {"quantized": True, "module_type": "QuantLinear"} for name in modules}}
    return head(**changes) | named | {"layer_sensitivity": layers}


def report(**changes):
    layers = [
        {"layer": module, "num_bits": 8.0, "sensitivity": score, "size_cost": 400.0}
        for module, score in scores("language_model").items()
    ]
    layers.append({"layer": "visual.blocks.0.attn.qkv", "num_bits": 16.0, "sensitivity": 0.0, "size_cost": 9.0})
    return head(**changes) | {"layer_sensitivity": layers}


def saved(folder, data, name="scheme_quant_manifest.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


def imported(folder, data):
    (result,) = importing.results(importing.read(saved(folder, data)))
    return result


@pytest.mark.parametrize("make", [manifest, report])
def test_each_layout_gives_the_groups_with_their_scores(tmp_path, make):
    result = imported(tmp_path, make())
    kinds = {(g.block, g.kind): score for g, score in zip(result.groups, result.scores, strict=True)}
    assert [kinds[0, k] for k in ("qkv", "o", "gate_up", "down")] == list(LEAVES.values())
    assert kinds[1, "gate_up"] == 0.25
    assert {g.weights for g in result.groups} == {800}
    assert (result.model.name, result.candidate.name) == ("tiny_vl_1b_instruct", "wint8_afp16")
    assert (result.method, result.calibration.score_samples) == ("gradient", 64)
    assert result.tags["source"] == "imported"


def test_the_output_head_is_a_group_outside_the_blocks(tmp_path):
    (group,) = [g for g in imported(tmp_path, manifest()).groups if g.kind == "lm_head"]
    assert (group.block, group.key) == (None, "lm_head")


def test_a_manifest_tells_the_linears_that_share_a_group(tmp_path):
    modules = {g.key: g.modules for g in imported(tmp_path, manifest()).groups}
    assert [m.rpartition(".")[2] for m in modules["B01.qkv"]] == ["q_proj", "k_proj", "v_proj"]
    assert [m.rpartition(".")[2] for m in modules["B01.gate_up"]] == ["gate_proj", "up_proj"]
    assert len(modules["B01.down"]) == 1


def test_a_report_names_only_the_first_linear_of_a_group(tmp_path):
    assert {len(g.modules) for g in imported(tmp_path, report()).groups} == {1}


def test_what_the_file_does_not_say_stays_unknown(tmp_path):
    result = imported(tmp_path, manifest())
    info, cal = result.candidate, result.calibration
    assert np.isnan(result.predicted_kl).all()
    assert (info.config, info.config_hash, math.isnan(info.bits), info.bits_modelopt) == ({}, "", True, 8.0)
    assert (cal.dataset, cal.digest, cal.seq_len, cal.loss_tokens, result.seed) == ("", "", None, None, None)
    assert (result.allocation.assignment, result.allocation.effective_bits_modelopt) == ((), 8.25)
    names = {name.removeprefix("eff.") for name in contract.parameters(result)}
    assert not names & {"model_revision", "config_hash", "dataset", "seq_len", "seed", "dtype", "device", "engine"}
    metrics = {key: value for key, value, _ in contract.metrics(result)}
    unknown = ("effective_bits", "predicted_kl_sum", "predicted_kl_chosen", "quantized_groups")
    assert not {f"summary/{name}" for name in unknown} & set(metrics)
    assert metrics["summary/nonfinite"] == 0
    assert contract.dataset(result) is None


def test_a_dataset_section_is_taken_as_far_as_it_goes(tmp_path):
    section = {"name": "captions", "size": "medium", "num_calib_samples": 128, "calib_seq_len": 512, "batch_size": 8}
    cal = imported(tmp_path, report(dataset=section)).calibration
    assert (cal.dataset, cal.size, cal.calib_samples, cal.seq_len, cal.batch_size) == (
        "captions",
        "medium",
        128,
        512,
        8,
    )
    assert (cal.digest, cal.score_rows) == ("", None)


def test_a_configuration_without_a_name_of_its_own_has_no_known_granularity(tmp_path):
    data = manifest((("CUSTOM_0", 4.0),), name="wfp4_afp16_autoquant_lm", formats=["MY_FP4_CFG"])
    info = imported(tmp_path, data).candidate
    assert (info.name, info.format_name, info.granularity, info.bits_modelopt) == ("wfp4_afp16", "MY_FP4_CFG", "", 4.0)
    assert "eff.granularity" not in contract.parameters(imported(tmp_path, data))


def test_a_pair_is_told_by_the_preset_where_the_scheme_does_not(tmp_path):
    data = manifest((("INT8_DEFAULT_CFG", 8.0),), name="int8_full", formats=["INT8_LM_CFG"])
    info = imported(tmp_path, data).candidate
    assert (info.quant_pair, info.format_name, info.granularity) == ("wint8_aint8", "INT8_DEFAULT_CFG", "default")


def test_a_pair_that_nothing_tells_is_not_guessed(tmp_path):
    info = imported(tmp_path, report(name="mine", formats=["MY_CFG"])).candidate
    assert (info.name, info.quant_pair, info.weight_precision) == ("MY_CFG", "", "")


def test_the_presets_are_what_modelopt_makes_of_them():
    from layerbits.candidates.bits import precision
    from layerbits.candidates.formats import resolve_format
    from layerbits.candidates.linear import INPUT, WEIGHT

    for name, (weight, activation) in PRESETS.items():
        cfgs = resolve_format(name).linear.cfgs
        assert (precision(cfgs[WEIGHT]), precision(cfgs[INPUT])) == (weight, activation), name


def test_several_formats_are_a_result_each(tmp_path):
    data = manifest((("FP8_DEFAULT_CFG", 8.0), ("W4A8_MXFP4_FP8_CFG", 4.0)), name="mixed")
    one, other = importing.results(importing.read(saved(tmp_path, data)))
    assert [r.candidate.quant_pair for r in (one, other)] == ["wfp8_afp8", "wfp4_afp8"]
    assert np.allclose(other.scores, 2 * one.scores)
    assert any("another format" in line for line in one.warnings)


def test_a_report_of_several_formats_is_refused(tmp_path):
    data = report(formats=["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
    with pytest.raises(UserError, match="one score per layer for 2 formats; import the quant manifest"):
        importing.results(importing.read(saved(tmp_path, data)))


def test_scored_groups_outside_the_language_model_are_counted(tmp_path):
    data = manifest()
    data["layer_sensitivity"]["model.visual.merger.linear_fc1.quant_recipe"] = entry((("INT8_DEFAULT_CFG", 8.0),), 0.5)
    data["layer_sensitivity"]["model.visual.blocks.1.attn.qkv.quant_recipe"] = entry(
        (("INT8_WEIGHT_ONLY_CFG", 8.0),), 0.5
    )
    result = importing.results(importing.read(saved(tmp_path, data)))[0]
    assert len(result.groups) == 9
    assert any(
        "1 groups outside the language model are left out; their scores sum to 0.5" in w for w in result.warnings
    )


def test_a_score_that_is_no_number_is_kept_as_not_finite(tmp_path):
    data = manifest()
    data["layer_sensitivity"]["lm_head.quant_recipe"]["scores"][0] = None
    result = imported(tmp_path, data)
    assert np.isnan(result.scores[[g.key == "lm_head" for g in result.groups]]).all()
    assert np.isfinite(result.scores).sum() == 8


def test_entries_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    data = report()
    del data["layer_sensitivity"][0]["sensitivity"]
    result = imported(tmp_path, data)
    assert len(result.groups) == 7
    assert any("1 entries of the file could not be read" in w for w in result.warnings)


def test_an_unknown_number_of_weights_is_said(tmp_path):
    data = report()
    del data["layer_sensitivity"][0]["size_cost"]
    assert any("weights of 1 groups is not known" in w for w in imported(tmp_path, data).warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(manifest())[:-20], "is not JSON or cut off"),
        ("[]", "is neither a quant manifest nor a per-layer report"),
        ({"model_type": "llama"}, "is neither a quant manifest nor a per-layer report"),
        ({**manifest(), "schema_version": 7}, "has schema_version 7, which this LayerBits does not read; upgrade"),
        ({"schema_version": 1, "candidates": []}, "is of LayerBits itself; log it with `layerbits push"),
        ({**head(), "layer_sensitivity": []}, "has no group with a score"),
        ({**head(), "layer_sensitivity": {"a": 3, "b": {"formats": ["X"]}}}, "has no group with a score"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refused:
        importing.read(saved(tmp_path, content))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_of_a_vision_tower_alone_is_refused(tmp_path):
    data = manifest()
    data["layer_sensitivity"] = {"visual.blocks.0.attn.qkv": entry((("FP8_DEFAULT_CFG", 8.0),), 1.0)}
    with pytest.raises(UserError, match="no linear of a language model"):
        importing.results(importing.read(saved(tmp_path, data)))


def test_a_folder_is_read_as_far_as_it_can_be(tmp_path):
    saved(tmp_path / "one", manifest())
    saved(tmp_path / "two", json.dumps(manifest())[:100])
    saved(tmp_path / "three", {"vocab_size": 7}, "config.json")
    tables, lines = importing.collect(tmp_path)
    assert [t.path.parent.name for t in tables] == ["one"]
    assert [Path(line.split(" is ")[0]).parent.name for line in lines] == ["three", "two"]


def test_a_report_beside_its_manifest_is_the_same_scoring(tmp_path):
    data = report()
    data["layer_sensitivity"] = [
        {"layer": m, "num_bits": 8.0, "sensitivity": s, "size_cost": 400.0} for m, s in scores().items()
    ]
    saved(tmp_path, data, "per-layer-sensitivity.json")
    saved(tmp_path, manifest())
    tables, lines = importing.collect(tmp_path)
    assert ([t.layout for t in tables], lines) == (["quant manifest"], [])
    data["layer_sensitivity"][0]["sensitivity"] *= 2
    saved(tmp_path, data, "per-layer-sensitivity.json")
    assert "differs in 1 groups from scheme_quant_manifest.json, which was taken" in importing.collect(tmp_path)[1][0]


def test_a_folder_with_nothing_to_import_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no JSON file in"):
        importing.collect(tmp_path)
    saved(tmp_path, "{")
    with pytest.raises(UserError, match=r"nothing to import: .*not JSON"):
        importing.collect(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        importing.collect(tmp_path / "nowhere")


def test_the_folder_of_a_result_can_be_read_back_and_is_the_same_each_time(tmp_path):
    table = importing.read(saved(tmp_path, manifest()))
    (result,) = importing.results(table)
    folder = importing.write(result, table, tmp_path / "out")
    first = contract.result_id(folder)
    again = load_manifest(folder)
    assert again.groups == result.groups
    assert np.array_equal(again.scores, result.scores)
    assert (again.allocation.assignment, math.isnan(again.allocation.effective_bits)) == ((), True)
    assert again.calibration.seq_len is None
    assert importing.write(result, table, tmp_path / "out") == folder
    assert contract.result_id(folder) == first
    assert (folder / "source" / table.path.name).read_bytes() == table.path.read_bytes()


def test_the_report_says_what_is_not_known(tmp_path):
    table = importing.read(saved(tmp_path, manifest()))
    folder = importing.write(importing.results(table)[0], table, tmp_path / "out")
    text = (folder / "report" / "layer-sensitivity-report.md").read_text()
    assert "the solver quantized an unknown number of 9 groups" in text
    assert "Which groups the solver quantized is not known." in text
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_schemes_cannot_be_made_of_it(tmp_path):
    from layerbits.schemes.source import combine

    with pytest.raises(UserError, match="was imported and does not say what its formats store"):
        combine({"run": imported(tmp_path, manifest())})


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")
@pytest.mark.parametrize(
    ("pair", "total", "most"),
    [
        ("wint8_afp16", 0.4011, "B00.down"),
        ("wfp8_afp8", 3.984, "B04.gate_up"),
        ("wfp4_afp16", 26.86, "B00.down"),
        ("wint8_aint8", 418.9, None),
    ],
)
def test_published_tables_have_their_known_figures(pair, total, most):
    (table,), lines = importing.collect(PUBLISHED / "qwen3_vl_4b_lm_medium" / pair)
    (result,) = importing.results(table)
    assert not lines
    assert (result.model.name, result.candidate.quant_pair) == ("qwen3_vl_4b_instruct", pair)
    assert f"{result.total('scores'):.4g}" == f"{total:.4g}"
    if most:
        assert result.rows()[0]["layer"] == most
    shares = result.shares()
    assert shares["gate_up"] + shares["down"] > 0.995


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not here")
def test_both_layouts_of_the_published_tables_say_the_same():
    for folder in sorted(PUBLISHED.glob("*/*")):
        both = [importing.results(importing.read(file))[0] for file in sorted(folder.glob("*.json"))]
        rows = [{(r["layer"], r["score"], r["weights"]) for r in result.rows()} for result in both]
        assert len(both) == 2
        assert rows[0] == rows[1]
