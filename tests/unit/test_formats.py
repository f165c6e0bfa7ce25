import copy
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from layerbits.candidates.formats import QuantPair, normalise, plain, resolve_format
from layerbits.candidates.linear import INPUT, WEIGHT
from layerbits.candidates.shipped import load_pairs, shipped_configs
from layerbits.errors import UserError

OFF = {"quantizer_name": "*", "enable": False}
INT8 = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
KV = {"FP8_KV_CFG", "FP8_AFFINE_KV_CFG", "NVFP4_KV_CFG", "NVFP4_AFFINE_KV_CFG", "NVFP4_KV_ROTATE_CFG"}
OURS = (
    "MXFP4_WEIGHT_ONLY_CFG",
    "FP8_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_FP8_ACT_CFG",
    "FP8_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
    "FP8_MLP_ONLY_CFG",
    "FP8_ATTENTION_ONLY_CFG",
    "INT8_MLP_ONLY_CFG",
    "INT8_ATTENTION_ONLY_CFG",
)


class Tree(nn.Module):
    """Linears under the names that the patterns of the presets speak of."""

    def __init__(self):
        super().__init__()
        for name in (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.gate",
            "model.layers.0.block_sparse_moe.experts.1.w1",
            "model.layers.0.block_sparse_moe.gate",
            "model.layers.0.mixer.up_proj",
            "model.visual.blocks.0.mlp.up_proj",
            "mtp.fc",
            "lm_head",
        ):
            parent = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, nn.Linear(32, 32, bias=False))


def quantized(config):
    """Name → quantized linear, as mtq.quantize leaves it without calibration."""
    model = mtq.quantize(Tree(), {**config, "algorithm": None})
    return {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}


def attributes(quantizer):
    stages = quantizer if isinstance(quantizer, nn.Sequential) else [quantizer]
    return [(q.is_enabled, q.is_enabled and (q.num_bits, q.axis, q.block_sizes, q._dynamic)) for q in stages]


@pytest.mark.parametrize("name", sorted({*mtq.config.choices, *OURS} - KV))
def test_covers_and_bare_say_what_quantize_does(name):
    format = resolve_format(name)
    scoped, bare = quantized(format.config), quantized(format.bare())
    for module in scoped:
        assert format.linear.covers(module) == scoped[module].weight_quantizer.is_enabled, module
        if format.linear.covers(module):
            for quantizer in (WEIGHT, INPUT):
                expected, got = getattr(scoped[module], quantizer), getattr(bare[module], quantizer)
                assert attributes(expected) == attributes(got), (module, quantizer)


def test_bare_keeps_what_auto_quantize_can_match():
    bare = resolve_format("NVFP4_MLP_ONLY_CFG").bare()
    assert [e["quantizer_name"] for e in bare["quant_cfg"]] == ["*", "*weight_quantizer", "*input_quantizer"]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVFP4_MSE_WEIGHT_ONLY_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
        ("NVFP4_FOUR_OVER_SIX_WEIGHT_ONLY_CFG", "NVFP4_FOUR_OVER_SIX_CFG"),
    ],
)
def test_weight_only_formats_have_the_weights_and_calibration_of_their_preset(name, preset):
    mine, whole = resolve_format(name), resolve_format(preset)
    assert mine.linear.cfgs[WEIGHT] == whole.linear.cfgs[WEIGHT]
    assert mine.linear.cfgs[INPUT] is None
    assert mine.config["algorithm"] == whole.config["algorithm"]


@pytest.mark.parametrize("name", sorted(KV))
def test_a_format_without_weights_is_refused(name):
    with pytest.raises(UserError, match=f"format {name}: it leaves weight_quantizer"):
        resolve_format(name)


def test_lm_head_is_out_unless_asked_for():
    format = resolve_format("FP8_DEFAULT_CFG")
    assert not format.linear.covers("lm_head")
    assert format.linear.covers("lm_head", lm_head=True)


def test_asking_for_lm_head_lifts_no_other_exclusion():
    assert not resolve_format("FP8_DEFAULT_CFG").linear.covers("model.visual.blocks.0.mlp.up_proj", lm_head=True)
    assert not resolve_format("FP8_MLP_ONLY_CFG").linear.covers("lm_head", lm_head=True)


@pytest.mark.parametrize("name", ["FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"])
def test_all_layers_formats_exclude_no_name(name):
    format = resolve_format(name)
    assert all(
        format.linear.covers(m) for m in ("lm_head", "model.visual.blocks.0.mlp.up_proj", "model.layers.0.mlp.gate")
    )


@pytest.mark.parametrize(("name", "mlp"), [("INT8_MLP_ONLY_CFG", True), ("INT8_ATTENTION_ONLY_CFG", False)])
def test_restricted_formats_cover_their_part(name, mlp):
    format = resolve_format(name)
    assert format.linear.covers("model.layers.3.mlp.up_proj") is mlp
    assert format.linear.covers("model.layers.3.self_attn.q_proj") is not mlp


def test_our_formats_have_modelopts_numerics_and_exclusions():
    ours, theirs = resolve_format("FP8_WEIGHT_ONLY_CFG").config, copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    theirs["quant_cfg"] = [e for e in theirs["quant_cfg"] if e["quantizer_name"] != "*input_quantizer"]
    assert ours == theirs


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"])
def test_presets_are_not_shared(name):
    before = copy.deepcopy(getattr(mtq, name))
    config = resolve_format(name).config
    config["quant_cfg"][1]["cfg"]["num_bits"] = 1
    config["quant_cfg"][1]["cfg"].setdefault("block_sizes", {})[-1] = 7
    assert getattr(mtq, name) == before


def test_an_uncalibrated_static_input_gets_an_algorithm():
    format = resolve_format("W4A8_MXFP4_FP8_CFG")
    assert format.config["algorithm"] == "max"
    assert format.adjustments == (
        "algorithm none → max: the static input_quantizer would never be calibrated, its range new at each call",
    )


@pytest.mark.parametrize("name", ["MXFP4_DEFAULT_CFG", "MXFP4_WEIGHT_ONLY_CFG"])
def test_what_needs_no_calibration_gets_none(name):
    format = resolve_format(name)
    assert format.config["algorithm"] is None
    assert format.adjustments == ()


@pytest.mark.parametrize("name", ["W4A8_NVFP4_FP8_CFG", "NVFP4_MLP_WEIGHT_ONLY_CFG"])
def test_nvfp4_presets_say_the_block_that_is_computed(name):
    format = resolve_format(name)
    assert format.bare()["quant_cfg"][1]["cfg"]["block_sizes"][-1] == 16
    assert any(a.startswith("NVFP4 block 32 → 16") for a in format.adjustments)


def test_an_nvfp4_block_of_the_users_is_left_for_the_capability_check():
    format = resolve_format(mtq.W4A8_NVFP4_FP8_CFG)
    assert format.bare()["quant_cfg"][1]["cfg"]["block_sizes"][-1] == 32
    assert format.adjustments == ()


def test_what_is_not_searched_is_told():
    (line,) = resolve_format("NVFP4_FP8_MHA_CONFIG").adjustments
    assert line.startswith("*[qkv]_bmm_quantizer")
    assert line.endswith("left out: AutoQuantize scores weights and inputs of linears only")


def test_a_cost_override_is_told():
    format = resolve_format({"quant_cfg": [OFF, INT8], "effective_bits": 3.0})
    assert format.adjustments[0].startswith("effective_bits left out")
    assert "effective_bits" not in format.config


def test_the_fp4_variant_picks_the_format():
    spec = {"mxfp4": "MXFP4_WEIGHT_ONLY_CFG", "nvfp4": "W4A16_NVFP4_CFG"}
    assert [resolve_format(spec, fp4).name for fp4 in spec] == list(spec.values())


def test_a_missing_fp4_variant_is_refused():
    with pytest.raises(UserError, match="fp4=nvfp4 has no format in this pair; use fp4=mxfp4"):
        resolve_format({"mxfp4": "MXFP4_WEIGHT_ONLY_CFG"}, "nvfp4")


def test_a_dict_that_is_no_format_is_refused():
    with pytest.raises(UserError, match="a format dict needs quant_cfg, or a name for each of mxfp4, nvfp4"):
        resolve_format({"weights": "fp8"})


def test_an_unknown_name_lists_what_is_near_and_how_to_add_one():
    with pytest.raises(UserError) as error:
        resolve_format("FP8_DEFAULT_CONFIG")
    assert "FP8_DEFAULT_CFG" in str(error.value)
    assert "module:ATTRIBUTE or a dict with quant_cfg" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_attribute_resolves(tmp_path, monkeypatch):
    (tmp_path / "my_formats.py").write_text(f"MINE = {{'quant_cfg': [{OFF}, {INT8}], 'algorithm': 'max'}}\nOTHER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_format("my_formats:MINE").config == {"quant_cfg": [OFF, INT8], "algorithm": "max"}
    with pytest.raises(UserError, match="my_formats has no NONE; check the name"):
        resolve_format("my_formats:NONE")
    with pytest.raises(UserError, match="my_formats:OTHER is not a dict with quant_cfg"):
        resolve_format("my_formats:OTHER")


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"cannot import no_such_formats .*; put its folder on PYTHONPATH"):
        resolve_format("no_such_formats:MINE")


def test_every_spelling_comes_to_the_ordered_list():
    mxfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
    expected = {
        "quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": mxfp4}],
        "algorithm": "max",
    }
    legacy = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": copy.deepcopy(mxfp4)}}
    words = {"num_bits": "e2m1", "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": "E8M0"}}
    recipe = {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": words, "parent_class": None}]}
    from_json = json.loads(json.dumps(plain(expected)))
    assert [normalise(c) for c in (expected, legacy, recipe, from_json)] == [expected] * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_cfg": 3}, "ModelOpt refuses .*quant_cfg: .*must be a sequence"),
        (
            {"quant_cfg": [OFF, {"quantizer_name": "*w", "cfg": {"bits": 8}}]},
            r"\(bits: Extra inputs are not permitted\)",
        ),
        ({"quant_cfg": [OFF, {"quantizer_name": "*w", "cfg": {"num_bits": [7, 3]}}]}, "Supported FPx"),
        (
            {"quant_cfg": [OFF, {"quantizer_name": "*w", "cfg": {"axis": 0, "block_sizes": {-1: 32}}}]},
            "axis must be None when block_sizes",
        ),
        ({"quant_cfg": [OFF, INT8], "algorithm": "maximum"}, "Algorithm maximum not found"),
        ({"quant_cfg": [OFF, INT8], "algorithm": {"method": "max", "x": 1}}, r"\(x: Extra inputs"),
        ({"quant_cfg": [OFF, INT8], "algorithm": {"x": 1}}, "ModelOpt refuses .*'method'"),
        (
            {"quant_cfg": [OFF, INT8], "notes": "mine"},
            "unknown keys notes; it has quant_cfg, algorithm, effective_bits",
        ),
        (
            {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "enable": False}}]},
            "write enable beside cfg; ModelOpt ignores it inside",
        ),
        (
            {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 2}}]},
            r"\*weight_quantizer: axis 2 is out of range for a Linear; use -2 to 1",
        ),
        (
            {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"block_sizes": {-3: 32}}}]},
            "block_sizes dimension -3 is out of range",
        ),
    ],
)
def test_what_modelopt_refuses_is_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        resolve_format(config)
    assert str(error.value).startswith("format custom: ")
    assert "\n" not in str(error.value)


def test_plain_refuses_objects():
    with pytest.raises(UserError, match="which is not plain data"):
        plain({"calibrator": torch.nn.Linear})


def test_the_pairs_map_to_their_formats():
    formats = {p.name: p.format for p in load_pairs()}
    assert len(formats) == 22
    assert formats["wfp8_afp8"] == "FP8_DEFAULT_CFG"
    assert formats["wfp8_afp16"] == "FP8_WEIGHT_ONLY_CFG"
    assert formats["wint8_afp16"] == "INT8_WEIGHT_ONLY_CFG"
    assert formats["wint8_afp8"] == "INT8_WEIGHT_FP8_ACT_CFG"
    assert formats["wint8_aint8"] == "INT8_DEFAULT_CFG"
    assert formats["wint4_afp16"] == "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"
    assert formats["wfp4_afp8"] == {"mxfp4": "W4A8_MXFP4_FP8_CFG", "nvfp4": "W4A8_NVFP4_FP8_CFG"}
    assert formats["wfp4_afp4"] == {"mxfp4": "MXFP4_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
    assert formats["wmxfp8_amxfp8"] == "MXFP8_DEFAULT_CFG"
    assert formats["wfp4_afp16"] == {"mxfp4": "MXFP4_WEIGHT_ONLY_CFG", "nvfp4": "W4A16_NVFP4_CFG"}


def test_only_int4_activations_are_experimental():
    assert {p.name for p in load_pairs() if p.experimental} == {f"w{w}_aint4" for w in ("fp4", "fp8", "int8", "int4")}


@pytest.mark.parametrize("path", sorted((shipped_configs() / "quant_pair").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_pair_file_reads_through_hydras_loader(path: Path):
    pair = QuantPair.from_mapping(OmegaConf.to_container(OmegaConf.load(path)))
    variants = {"wmxfp8_amxfp8": "wfp8_afp8"}
    plain_name = variants.get(pair.name, pair.name.replace("_mse_", "_").replace("_4o6_", "_"))
    assert pair.name == path.stem
    assert plain_name == f"w{pair.weight}_a{pair.activation}"
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "weight": "fp8"}, "quant pair x: missing activation, format; it has the keys"),
        ({"name": "x", "weight": "fp8", "activation": "fp8", "format": "F", "bits": 8}, "quant pair x: unknown bits"),
        ({"name": "a/b", "weight": "fp8", "activation": "fp8", "format": "F"}, "name 'a/b' must be letters, digits"),
    ],
)
def test_a_bad_pair_is_refused(mapping, message):
    with pytest.raises(UserError, match=message):
        QuantPair.from_mapping(mapping)
