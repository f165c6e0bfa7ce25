"""What is wrong with experts, or asked of them, is said in one line before any weights are loaded."""

import re
import shutil

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.config import Settings
from layerbits.errors import Unsupported, UserError
from layerbits.inputs import smollm2
from layerbits.stages.workbench import workbench
from tests import families

from .scoring_support import CONFIGS, candidate, tiny_model


def shape(folder, model, **changes):
    """A checkpoint without weights, with the default model's tokenizer."""
    changes |= {"vocab_size": 49_152, "max_position_embeddings": 512, "architectures": [type(model).__name__]}
    model.config.update(changes)
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2.checkpoint() / name, folder)


def settings(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return Settings.from_config(OmegaConf.to_container(compose("sensitivity", list(overrides)), resolve=True))


def bench(folder, *overrides):
    return workbench(settings("model=hf", f"model.path={folder}", "model.random_weights=true", *overrides))


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.2", "nan"])
def test_a_share_of_experts_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(UserError, match=r"active_expert_ratio=.* is not in \(0, 1\]; give the share of the experts"):
        settings(f"autoquant.active_expert_ratio={ratio}")


def test_a_share_of_experts_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="active_expert_ratio=half is not a number"):
        settings("autoquant.active_expert_ratio=half")


@pytest.mark.parametrize("wrong", ["autoquant.cost_model=active_moe", "autoquant.active_expert_ratio=0.5"])
def test_a_dense_model_has_no_active_experts(wrong):
    with pytest.raises(UserError, match=r"smollm2_135m has no routed experts; use autoquant\.cost_model=weight"):
        workbench(settings(wrong))


def test_a_block_that_does_not_divide_an_experts_width_is_told_and_refused_where_it_must_be_served(tmp_path):
    shape(tmp_path, tiny_model("qwen3_moe"), moe_intermediate_size=96)
    one_line = (
        r"weights: groups of 128 do not divide the inputs of model\.layers\.0\.mlp\.experts \(second projection\) "
        r"and 1 more \(96\); sizes that would do: 32, 16"
    )
    (note,) = bench(tmp_path).check(candidate("wint4_afp16")).notes
    assert re.match(one_line, note), note
    with pytest.raises(Unsupported, match=one_line):
        bench(tmp_path, "strict=true").check(candidate("wint4_afp16"))


def test_a_router_that_a_format_does_not_leave_out_is_told_and_refused_where_it_must_be_served(tmp_path):
    shape(tmp_path, families.build("jamba"))
    asked = resolve_candidate(QuantPair("mine", "fp8", "fp8", "FP8_ALL_LAYERS_CFG"), Overlay("default", {}))
    router = "model.layers.1.feed_forward.router"
    plain = bench(tmp_path)
    assert router not in plain.scored(candidate("wfp8_afp8"))
    assert router in plain.scored(asked)
    says = f"{router}: runtimes keep routers in 16 bits; use a format with ModelOpt's exclusions"
    assert any(note.startswith(says) for note in plain.check(asked).notes)
    with pytest.raises(Unsupported, match="; strict=false scores it all the same"):
        bench(tmp_path, "strict=true").check(asked)
