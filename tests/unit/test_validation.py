"""What a validation says of rounding, without a model."""

import numpy as np
import pytest

from layerbits.results.result import Group, ModelInfo
from layerbits.trust.agreement import Captions
from layerbits.trust.validation import HeldOut, Prediction, Validation, markdown

KL = np.array([1e-3, 2e-3, 4e-3, 8e-3])


def made(floor, dtype="bfloat16"):
    groups = tuple(Group(f"B0{i}.o", i, "o", (f"layers.{i}.o",), 100) for i in range(4))
    tokens = np.full(20, 10.0)
    return Validation(
        source_run_id="run",
        model=ModelInfo("tiny", "tiny", "r0", "LlamaForCausalLM", "bfloat16"),
        candidate="wfp8_afp8",
        config_hash="0",
        groups=groups,
        data=HeldOut("everyday", "packed", 32, 8),
        predictions=(Prediction("this run (gradient)", KL, True, None, 0.0),),
        measured=Captions(tokens[:, None] * KL, tokens),
        loss_change=KL,
        all_but=None,
        together=float(KL.sum()),
        floor=np.full(4, floor),
        repeated=0.0,
        seconds={},
        provenance={},
        created="",
        dtype=dtype,
        memory={"measure_estimate_gb": 1.0},
    )


def test_the_first_line_says_how_many_groups_can_be_told_from_rounding():
    lines = markdown(made(1.5e-3)).splitlines()
    assert lines[2].startswith("2 of 4 groups can be told from the rounding of bfloat16; dtype=float32 tells more")
    assert "Scored in bfloat16, measured in bfloat16" in lines[4]


def test_in_float32_the_line_is_not_needed():
    assert "can be told" not in markdown(made(1e-12, "float32"))


@pytest.mark.parametrize(("dtype", "words"), [("bfloat16", "use dtype=float32"), ("float32", "a pair of fewer bits")])
def test_where_no_group_counts_one_line_says_what_would_help(dtype, words):
    found = made(1.0, dtype)
    assert words in found.blind
    assert "wfp8_afp8" in found.blind


def test_a_validation_with_one_group_that_counts_is_not_blind():
    assert made(3e-3).blind == ""
    assert made(3e-3).metrics()["memory/measure_estimate_gb"] == 1.0
