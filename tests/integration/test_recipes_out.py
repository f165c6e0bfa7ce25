"""Schemes as recipes of others: ModelOpt computes what we computed."""

import copy
from dataclasses import replace

import pytest
import torch

from layerbits.inputs.experts import named_experts
from layerbits.probing.apply import apply_scheme
from layerbits.recipes.recipe import load_recipe
from layerbits.recipes.space import lay_out
from layerbits.results.assignment import Assignment
from layerbits.results.result import Group
from layerbits.schemes import Scheme
from layerbits.schemes.ptq_recipe import ptq_recipe_yaml
from layerbits.scoring.steps import calibration_forward

from .recipes_support import on_cpu
from .schemes_support import CALIBRATION, DATA, INFO, logits, scheme_of
from .scoring_support import candidate, loaded, tiny_model


def quantized_by_modelopt(model, recipe):
    """``mtq.quantize`` with a PTQ recipe; the model is changed."""
    import modelopt.torch.quantization as mtq

    def forward_loop(m):
        for batch in CALIBRATION:
            calibration_forward(m, batch, need_logits=True)

    return mtq.quantize(model, on_cpu(copy.deepcopy(recipe.fixed)), forward_loop)


NVFP4 = ("wfp4_afp4", "default", "nvfp4")
SCHEMES = {
    "fp8": {"qkv": ("wfp8_afp8",), "down": ("wfp8_afp8",)},
    "nvfp4_and_fp8": {"qkv": ("wfp8_afp8",), "gate_up": NVFP4, "down1": NVFP4},
    "nvfp4_searched_and_fp8": {"qkv": ("wfp4_mse_afp4",), "down": ("wfp8_afp8",)},
    "four_over_six": {"qkv": ("wfp4_4o6_afp16",), "gate_up0": ("wfp4_4o6_afp16",)},
    "mxfp8": {"gate_up": ("wmxfp8_amxfp8",)},
    "int8": {"o": ("wint8_aint8",), "gate_up": ("wint8_afp16", "w_group32")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "kv_cache"),
    [
        *((name, "llama", "none") for name in SCHEMES),
        *((name, "qwen3_vl", "fp8") for name in ("nvfp4_and_fp8", "int8")),
        ("fp8", "llama", "fp8"),
        ("fp8", "llama", "fp8_cast"),
        ("mxfp8", "llama", "fp8"),
        ("int8", "llama", "nvfp4"),
        ("int8", "llama", "nvfp4_cast"),
    ],
)
def test_ptq_recipe_gives_the_same_quantizers_and_logits(name, kind, kv_cache, tmp_path):
    model = tiny_model(kind)
    assigned = {where: candidate(*which) for where, which in SCHEMES[name].items()}
    scheme = scheme_of(model, **assigned)
    language_model = "model.language_model" if kind == "qwen3_vl" else ""
    scheme = replace(scheme, kv_cache=kv_cache, model=replace(scheme.model, language_model=language_model))
    with apply_scheme(model, scheme, CALIBRATION):
        mine = logits(model)
    with apply_scheme(model, replace(scheme, kv_cache="none"), CALIBRATION):
        assert torch.equal(logits(model), mine) == (kv_cache == "none")
    path = tmp_path / "scheme.yaml"
    path.write_text(ptq_recipe_yaml(scheme))
    quantized = quantized_by_modelopt(model, load_recipe(str(path)))
    enabled = {
        name.removesuffix(".weight_quantizer")
        for name, module in quantized.named_modules()
        if name.endswith("weight_quantizer") and module.is_enabled
    }
    assert enabled == set(scheme.modules)
    assert torch.equal(logits(quantized), mine)


def test_headroom_of_activations_is_modelopts(tmp_path):
    model = tiny_model("llama")
    recipe = load_recipe("general/ptq/nvfp4_act_headroom-kv_fp8_cast")
    (made,) = lay_out(recipe, model, loaded(model).linears).candidates
    assert made.info.config["algorithm"]["method"] == "nvfp4_act_headroom"
    scheme = scheme_of(model, qkv=made, down=made)
    with apply_scheme(model, scheme, CALIBRATION):
        mine = logits(model)
    plain = replace(made.info, config={**made.info.config, "algorithm": "max"}, config_hash="max")
    with apply_scheme(model, replace(scheme, candidates=(plain,)), CALIBRATION):
        assert not torch.equal(logits(model), mine)
    path = tmp_path / "scheme.yaml"
    path.write_text(ptq_recipe_yaml(scheme))
    assert torch.equal(logits(quantized_by_modelopt(model, load_recipe(str(path)))), mine)


@pytest.mark.parametrize("pair", [("wfp8_afp8",), NVFP4], ids=lambda pair: pair[0])
def test_ptq_recipe_of_fused_experts_gives_the_same_logits(pair, tmp_path):
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("eager")  # what ModelOpt's wrapper of fused experts can intercept
    made = candidate(*pair)
    names = list(named_experts(model))
    groups = tuple(Group(f"B{b:02d}.experts", b, "experts", (name,), 1000) for b, name in enumerate(names))
    assigned = (made.info.name,) * len(groups)
    scheme = Scheme("mine", ("run",), INFO, DATA, groups, (made.info,), Assignment(assigned), 9.0, None, 0.01, 1e-6, {})
    before = logits(model)
    with apply_scheme(model, scheme, CALIBRATION):
        mine = logits(model)
    assert not torch.equal(mine, before)
    path = tmp_path / "scheme.yaml"
    path.write_text(ptq_recipe_yaml(scheme))
    torch.testing.assert_close(logits(quantized_by_modelopt(model, load_recipe(str(path)))), mine, rtol=1e-5, atol=1e-6)
