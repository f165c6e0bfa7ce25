import pytest

from layerbits.candidates.bits import modelopt_bits, precision, weight_bits
from layerbits.candidates.formats import resolve_format
from layerbits.candidates.linear import check_dimensions, read_config
from layerbits.errors import UserError

OFF = {"quantizer_name": "*", "enable": False}


def weights(cfg, *more):
    return {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": cfg}, *more], "algorithm": "max"}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("MXFP4_WEIGHT_ONLY_CFG", 4.25),
        ("W4A16_NVFP4_CFG", 4.5),
        ("W4A8_NVFP4_FP8_CFG", 4.5),
        ("NVFP4_FOUR_OVER_SIX_CFG", 4.5),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 4.125),
        ("W4A8_AWQ_BETA_CFG", 4.125),
        ("FP8_DEFAULT_CFG", 8),
        ("INT8_WEIGHT_ONLY_CFG", 8),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 8 + 16 / 128**2),
        ("MXFP6_DEFAULT_CFG", 6.25),
        ("INT8_WEIGHT_INT4_ACT_CFG", 8),
    ],
)
def test_weight_bits_of_a_format(name, bits):
    assert weight_bits(resolve_format(name).linear) == bits


@pytest.mark.parametrize(
    ("cfg", "bits"),
    [
        ({"num_bits": 8, "block_sizes": {-1: 32}}, 8.5),
        ({"num_bits": 4, "axis": 0}, 4),
        ({"num_bits": 8, "block_sizes": {-1: None}}, 8),
        ({}, 8),
    ],
)
def test_weight_bits_of_a_setting(cfg, bits):
    assert weight_bits(read_config(weights(cfg))) == bits


def test_weight_bits_of_a_word_are_refused():
    with pytest.raises(UserError, match="'nf4' does not tell the storage bits; give a number"):
        weight_bits(read_config(weights({"num_bits": "nf4"})))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("INT8_WEIGHT_INT4_ACT_CFG", 4), ("W4A16_NVFP4_CFG", 4.5), ("MXFP4_WEIGHT_ONLY_CFG", 4), ("FP8_DEFAULT_CFG", 8)],
)
def test_modelopt_bits_are_the_minimum_over_weights_and_inputs(name, bits):
    assert modelopt_bits(resolve_format(name).linear) == bits


def test_modelopt_bits_ignore_an_override_for_the_whole_config():
    assert modelopt_bits(read_config({**resolve_format("FP8_DEFAULT_CFG").config, "effective_bits": 3.0})) == 8


def test_the_last_entry_that_matches_wins():
    later = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4}}
    assert read_config(weights({"num_bits": 8}, later)).cfgs == {
        "weight_quantizer": {"num_bits": 4},
        "input_quantizer": None,
    }


def test_a_quantizer_switched_on_again_keeps_its_setting():
    entries = [{"quantizer_name": "*weight_quantizer", "enable": on} for on in (False, True)]
    assert read_config(weights({"num_bits": 4}, *entries)).cfgs["weight_quantizer"] == {"num_bits": 4}


def test_entries_of_other_module_classes_do_not_count():
    other = {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Conv2d", "cfg": {"num_bits": 4}}
    assert read_config(weights({"num_bits": 8}, other)).cfgs["weight_quantizer"] == {"num_bits": 8}


def test_linears_that_differ_are_refused_by_their_patterns():
    some = {"quantizer_name": "*mlp*input_quantizer", "cfg": {"num_bits": 8}}
    with pytest.raises(UserError, match=r"differently by \*mlp, a candidate has one setting; make a format of each"):
        read_config(weights({"num_bits": 8}, some))


def test_a_module_pattern_that_excludes_a_linear_makes_no_difference():
    excluded = {"quantizer_name": "*router*", "enable": False}
    assert read_config(weights({"num_bits": 8}, excluded)).cfgs["weight_quantizer"] == {"num_bits": 8}


def test_no_weights_at_all_is_refused():
    with pytest.raises(UserError, match="quantizes no weights; enable"):
        read_config({"quant_cfg": [OFF], "algorithm": "max"})


def test_what_is_left_at_the_default_is_refused():
    config = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}], "algorithm": "max"}
    with pytest.raises(UserError, match="leaves input_quantizer at ModelOpt's default; start it with"):
        read_config(config)


def test_too_many_patterns_are_refused():
    many = [{"quantizer_name": f"*layers.{i}.*input_quantizer", "cfg": {"num_bits": 8}} for i in range(11)]
    with pytest.raises(UserError, match="11 module patterns apart, 10 at most"):
        read_config(weights({"num_bits": 8}, *many))


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        (None, "fp16"),
        ({}, "int8"),
        ({"num_bits": (2, 1)}, "fp4"),
        ({"num_bits": (4, 3)}, "fp8"),
        ([{"num_bits": 4}, {"num_bits": (4, 3)}], "int4"),
        ({"num_bits": "nf4"}, "nf4"),
    ],
)
def test_precision(cfg, word):
    assert precision(cfg) == word


@pytest.mark.parametrize(
    ("quantizer", "axes", "message"),
    [
        ("weight_quantizer", 2, "axis 2 is out of range for a Linear; use -2 to 1"),
        ("weight_quantizer", (0, -3), "axis -3 is out of range"),
        ("input_quantizer", 3, "axis 3 is out of range for a Linear; use -3 to 2"),
        ("weight_quantizer", (0, 1), "one scale per value, which quantizes nothing"),
    ],
)
def test_axes_that_a_linear_does_not_have_are_refused(quantizer, axes, message):
    with pytest.raises(UserError, match=message):
        check_dimensions(quantizer, axes, "axis")
