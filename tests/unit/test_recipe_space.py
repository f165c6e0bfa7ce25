"""What a recipe says that does not fit a model: warned of, or refused in one line before any weights load."""

import pytest

from layerbits.errors import UserError
from layerbits.recipes.space import lay_out
from tests.integration.recipes_support import made_recipe
from tests.integration.scoring_support import loaded, tiny_model

FP8 = [{"$import": "a"}]


@pytest.fixture(scope="module")
def subject():
    return loaded(tiny_model("llama"))


def laid_out(subject, folder, **changes):
    return lay_out(made_recipe(folder, **changes), subject.model, subject.linears)


def space(pattern, **more):
    return {"module_name_patterns": [pattern], "candidate_formats": FP8, **more}


def test_patterns_that_match_nothing_are_named(subject, tmp_path):
    made = laid_out(subject, tmp_path, module_search_spaces=[space("*mlp*"), space("*mixer*")], candidate_formats=FP8)
    assert made.notes == ("recipe mine: *mixer* match no linear of this model",)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ([space("*q_proj")], r"\*q_proj match some of .*q_proj, .*k_proj, .*v_proj, which are decided together"),
        ([space("*mlp*"), space("*mlp.down*")], "are in 2 entries of module_search_spaces"),
        ([space("*mixer*")], r"leaves nothing to score on LlamaForCausalLM \(\*mixer\* match no linear"),
    ],
)
def test_patterns_that_do_not_fit_the_groups_are_refused(spaces, message, subject, tmp_path):
    fixed = {"algorithm": "max", "quant_cfg": [{"$import": "none"}]}
    with pytest.raises(UserError, match=message) as caught:
        laid_out(subject, tmp_path, quantize=fixed, module_search_spaces=spaces)
    assert "\n" not in str(caught.value)


def test_a_budget_below_what_must_be_quantized_at_all_tells_the_range(subject, tmp_path):
    both = [*FP8, {"$import": "b"}]
    spaces = [space("*", candidate_formats=both, allow_no_quant=False)]
    message = "effective_bits=6 cannot be reached on this model; the feasible range is 8 to 8"
    with pytest.raises(UserError, match=message):
        laid_out(
            subject,
            tmp_path,
            module_search_spaces=spaces,
            candidate_formats=FP8,
            constraints={"effective_bits": 6.0},
        )


def test_keys_and_values_in_two_formats_are_refused(tmp_path):
    caches = [
        {"quantizer_name": "*k_bmm_quantizer", "cfg": {"num_bits": "e4m3"}},
        {"quantizer_name": "*v_bmm_quantizer", "cfg": {"num_bits": 8}},
    ]
    recipe = made_recipe(tmp_path, candidate_formats=FP8, kv_cache={"quant_cfg": caches})
    with pytest.raises(UserError, match="recipe mine quantizes keys and values differently"):
        _ = recipe.cache_settings
