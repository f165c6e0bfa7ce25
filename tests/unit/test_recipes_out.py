"""Recipes of schemes as plain data, read by those that they are for."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import match_named_modules

from layerbits.errors import Unsupported
from layerbits.recipes.recipe import load_recipe
from layerbits.results.assignment import Assignment
from layerbits.results.result import CalibrationInfo, Group, ModelInfo
from layerbits.schemes import Scheme
from layerbits.schemes.llm_compressor import compressor_recipe, compressor_recipe_yaml
from layerbits.schemes.ptq_recipe import ptq_recipe, ptq_recipe_yaml
from tests.integration.scoring_support import candidate

KINDS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",)}
DATA = CalibrationInfo("everyday", "small", "d", "packed", 20, 2, 8, 8, 2, 2, 76, (38, 38), 0.0)


def scheme(assigned, prefix="model", language_model=""):
    """Twelve blocks; ``assigned`` is candidate by (block, kind)."""
    groups, names, used = [], [], {}
    for block in range(12):
        for kind, leaves in KINDS.items():
            modules = tuple(f"{prefix}.layers.{block}.{leaf}" for leaf in leaves)
            groups.append(Group(f"B{block:02d}.{kind}", block, kind, modules, 1000))
            made = assigned.get((block, kind), assigned.get(kind))
            names.append(made.info.name if made else None)
            if made:
                used[made.info.name] = made.info
    model = ModelInfo("tiny", "tiny", "r0", "M", "float32", language_model)
    numbers, candidates = (9.0, None, math.nan, 0.0), tuple(used.values())
    return Scheme(
        "mine", ("run",), model, DATA, tuple(groups), candidates, Assignment(names), *numbers, {"method": "budget"}
    )


class Tree(torch.nn.Module):
    """The linears of :func:`scheme` beside a vision tower."""

    def __init__(self, prefix):
        super().__init__()
        names = [f"{prefix}.layers.{b}.{leaf}" for b in range(12) for leaves in KINDS.values() for leaf in leaves]
        for name in [*names, "model.visual.layers.1.self_attn.q_proj", "lm_head"]:
            parent, parts = self, name.split(".")
            for part in parts[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.add_module(parts[-1], torch.nn.Linear(2, 2))


def compressed(made):
    return made["quant_stage"]["quant_modifiers"]["QuantizationModifier"]


def test_the_documents_target_recipe_for_compressed_tensors():
    """W INT4 per channel, A INT8 per token on the fly, vision tower ignored."""
    prefix = "model.language_model"
    mine = scheme({"qkv": candidate("wint4_aint8", "recipe_match_channel_token")}, prefix, prefix)
    modifier = compressed(yaml.safe_load(compressor_recipe_yaml(mine)))
    (group,) = modifier["config_groups"].values()
    read = QuantizationScheme(**group)
    assert (read.weights.num_bits, read.weights.type, read.weights.strategy) == (4, "int", "channel")
    assert (read.input_activations.num_bits, read.input_activations.strategy) == (8, "token")
    assert read.input_activations.dynamic
    assert "re:.*visual.*" in modifier["ignore"]
    matched = {n for n, _ in match_named_modules(Tree(prefix), group["targets"], ignore=modifier["ignore"])}
    assert matched == set(mine.modules)


def test_groups_and_ignored_linears_are_those_of_the_scheme():
    nvfp4 = candidate("wfp4_afp4", variant="nvfp4")
    mine = scheme({"qkv": nvfp4, (1, "qkv"): candidate("wfp8_afp8"), (11, "o"): candidate("wint8_afp16", "w_group32")})
    modifier = compressed(compressor_recipe(mine))
    found = {}
    for group in modifier["config_groups"].values():
        QuantizationScheme(**group)
        for name, _ in match_named_modules(Tree("model"), group["targets"], ignore=modifier["ignore"]):
            found[name] = (group["weights"]["num_bits"], group["weights"]["type"])
    bits = {"wfp4_afp4": (4, "float"), "wfp8_afp8": (8, "float"), "wint8_afp16/w_group32": (8, "int")}
    assert found == {module: bits[info.name] for module, info in mine.modules.items()}
    ignored = {n for n, m in match_named_modules(Tree("model"), modifier["ignore"]) if hasattr(m, "weight")}
    assert ignored == {*mine.exclude, "lm_head", "model.visual.layers.1.self_attn.q_proj"}


def test_an_fp8_cache_is_in_both_recipes():
    mine = replace(scheme({"qkv": candidate("wfp8_afp8")}), kv_cache="fp8")
    assert compressed(compressor_recipe(mine))["kv_cache_scheme"]["num_bits"] == 8
    entries = ptq_recipe(mine)["quantize"]["quant_cfg"]
    assert entries[-1] == {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": [4, 3]}}


@pytest.mark.parametrize("kv_cache", ["nvfp4", "fp8_cast", "nvfp4_cast"])
def test_a_cache_that_llm_compressor_has_not_is_refused(kv_cache):
    mine = replace(scheme({"qkv": candidate("wfp8_afp8")}), kv_cache=kv_cache)
    with pytest.raises(Unsupported, match=f"no {kv_cache} KV cache"):
        compressor_recipe(mine)
    assert ptq_recipe(mine)["quantize"]["quant_cfg"][-1]["quantizer_name"] == "*[kv]_bmm_quantizer"


def test_a_cache_is_calibrated_where_no_linear_is():
    mine = scheme({"qkv": candidate("wmxfp8_amxfp8")})
    assert ptq_recipe(mine)["quantize"]["algorithm"] is None
    assert ptq_recipe(replace(mine, kv_cache="fp8"))["quantize"]["algorithm"] == "max"


@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint8_aint8", "wfp4_afp4", "wmxfp8_amxfp8", "wfp4_mse_afp4"])
def test_modelopt_reads_the_recipe_and_its_calibration(pair, tmp_path):
    made = candidate(pair, variant="nvfp4")
    path = tmp_path / "mine.yaml"
    path.write_text(ptq_recipe_yaml(scheme({"o": made})))
    recipe = load_recipe(str(path))
    assert recipe.kind == "ptq"
    assert recipe.fixed["algorithm"] == made.format.config["algorithm"]
    names = {e["quantizer_name"] for e in recipe.fixed["quant_cfg"] if "cfg" in e}
    assert "model.layers.11.self_attn.o_proj.weight_quantizer" in names


def test_one_recipe_cannot_hold_two_calibrations():
    both = scheme({"qkv": candidate("wfp4_4o6_afp4"), "o": candidate("wfp8_afp8")})
    with pytest.raises(Unsupported, match="one calibration algorithm"):
        ptq_recipe(both)
    sweep = scheme({"qkv": candidate("wfp4_mse_afp4"), "o": candidate("wfp8_afp8")})
    assert ptq_recipe(sweep)["quantize"]["algorithm"]["fp8_scale_sweep"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (("wfp8_afp8", "w_per_in_channel"), "no word for"),
        (("wfp4_mse_afp4",), "calibrated by mse"),
    ],
)
def test_what_compressed_tensors_has_no_word_for_is_refused(made, message):
    with pytest.raises(Unsupported, match=message):
        compressor_recipe(scheme({"qkv": candidate(*made)}))
