"""ModelOpt's recipes: one pass against ``mtq.auto_quantize`` with the same recipe."""

import numpy as np
import pytest

from layerbits.recipes.recipe import load_recipe
from layerbits.recipes.solve import search_state, solve_like_modelopt, solve_recipe

from .recipes_support import made_recipe, raw_scores, stock_search
from .scoring_support import tiny_model

GENERAL = "general/auto_quantize/"
BOTH = [{"$import": "a"}, {"$import": "b"}]
FAMILY = {
    "nvfp4_fp8_at_5p4bits": "llama",
    "w4a16_nvfp4_fp8_at_6p0bits-active_moe": "qwen3_vl",
}
MOE = "huggingface/qwen3_6_moe/auto_quantize/"


def check_against_stock(recipe, kind, folder, rel=1e-5):
    """Decisions, costs, unclamped scores and chosen formats of both; returns the space and the scores."""
    space, raw = raw_scores(recipe, tiny_model(kind), folder)
    state, unclamped = stock_search(recipe, tiny_model(kind))
    mine = search_state(space, raw)
    assert list(mine["candidate_stats"]) == list(state["candidate_stats"])
    for name, stat in state["candidate_stats"].items():
        own = mine["candidate_stats"][name]
        for key in ("module_names", "cost_weight", "allow_no_quant", "uncompressed_cost", "is_fixed"):
            assert own[key] == stat[key], (name, key)
        assert own["costs"] == pytest.approx(stat["costs"], rel=1e-12), name
        assert own["scores"] == pytest.approx(stat["scores"], rel=rel), name
    for slot, row in zip(space.searched, raw, strict=True):
        told = sorted(unclamped[slot.name].values())
        assert sorted(row[c] for c in slot.choices) == pytest.approx(told, rel=rel), slot.name
    for name, chosen in state["best"]["recipe"].items():
        at = state["candidate_stats"][name]["formats"].index(chosen)
        own_at = mine["candidate_stats"][name]["formats"].index(mine["best"]["recipe"][name])
        assert own_at == at, name
    assert mine["best"]["constraints"] == pytest.approx(state["best"]["constraints"])
    return space, raw


@pytest.mark.parametrize("name", FAMILY)
def test_shipped_recipe_comes_to_what_modelopt_finds(name, tmp_path):
    space, raw = check_against_stock(load_recipe(GENERAL + name), FAMILY[name], tmp_path)
    assert solve_recipe(space, raw).score <= solve_like_modelopt(space, raw).score * (1 + 1e-9)


@pytest.mark.parametrize(
    "name",
    ["w4a16_nvfp4_fp8_at_6p0bits-active_moe", "w4a16_nvfp4_fp8_module_spaces_at_6p0bits-active_moe"],
)
def test_shipped_recipe_for_a_mixture_of_experts(name, tmp_path):
    space, _ = check_against_stock(load_recipe(MOE + name), "qwen3_moe", tmp_path)
    assert {slot.cost_weight for slot in space.slots} == {1.0, 0.03125}


def test_a_recipe_scored_by_kl_div(tmp_path):
    recipe = load_recipe(f"{GENERAL}nvfp4_fp8_kl_div_at_5p4bits")
    check_against_stock(recipe, "llama", tmp_path, rel=1e-3)  # float32 sums over a vocabulary


def test_search_spaces_fixed_part_and_forced_quantization(tmp_path):
    spaces = [
        {"module_name_patterns": ["*self_attn*"], "candidate_formats": BOTH, "allow_no_quant": False},
        {"module_name_patterns": ["*layers.1.mlp.down_proj"], "candidate_formats": [{"$import": "b"}]},
    ]
    fixed = {"algorithm": "max", "quant_cfg": [
        {"$import": "none"},
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": "e4m3"}},
        {"quantizer_name": "*mlp*input_quantizer", "cfg": {"num_bits": "e4m3"}},
        {"quantizer_name": "*lm_head*", "enable": False},
    ]}  # fmt: skip
    recipe = made_recipe(tmp_path, quantize=fixed, module_search_spaces=spaces, cost_excluded_layers=["*lm_head*"])
    space, _ = check_against_stock(recipe, "llama", tmp_path)
    assert len(space.held) == 2 + 3
    assert space.ceiling < 16


def test_scores_are_not_clamped_where_modelopt_clamps(tmp_path):
    recipe = made_recipe(tmp_path, candidate_formats=BOTH)
    space, raw = check_against_stock(recipe, "llama", tmp_path)
    stats = search_state(space, raw)["candidate_stats"]
    clamped = [s["scores"][0] == s["scores"][1] for s in stats.values()]
    assert any(clamped)
    assert not np.any(raw[:, 0] == raw[:, 1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{GENERAL}nvfp4_mse_fp8_at_6p0bits", "llama"),
        ("models/meta-models/Muse-Glimmer-30B/auto_quantize/w4a16_nvfp4_4o6_mixed", "qwen3_vl"),
    ],
)
def test_recipes_with_searched_weight_ranges(name, kind, tmp_path):
    check_against_stock(load_recipe(name), kind, tmp_path)
