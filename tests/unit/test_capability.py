from dataclasses import replace

import modelopt.torch.quantization as mtq
import pytest

from layerbits.candidates.bits import precision
from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.capability import Capability, check
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay, register_backend
from layerbits.candidates.linear import INPUT, WEIGHT
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.errors import Unsupported

PAIRS = {p.name: p for p in load_pairs()}
OVERLAYS = {o.name: o for o in load_overlays()}
OFF = {"quantizer_name": "*", "enable": False}
NOTHING = Overlay("default", {})
SMOLLM2 = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}
MX = {"type": "dynamic", "scale_bits": (8, 0)}
NV = {"type": "dynamic", "scale_bits": (4, 3)}


def candidate(pair, overlay="default", fp4="mxfp4"):
    return resolve_candidate(PAIRS[pair], OVERLAYS[overlay], fp4, experimental=True)


def custom(weight, activation=None):
    """A candidate of the user's own settings."""
    entries = [OFF, {"quantizer_name": f"*{WEIGHT}", "cfg": weight}]
    if activation is not None:
        entries.append({"quantizer_name": f"*{INPUT}", "cfg": activation})
    config = {"quant_cfg": entries, "algorithm": "max"}
    return resolve_candidate(QuantPair("mine", precision(weight), precision(activation), config), NOTHING)


@pytest.mark.parametrize(
    ("pair", "fp4", "cuda", "numerics"),
    [
        ("wfp8_afp8", "mxfp4", False, "none"),
        ("wfp4_afp8", "mxfp4", False, "reference"),
        ("wfp4_afp8", "nvfp4", False, "reference"),
        ("wfp4_afp16", "mxfp4", True, "cuda"),
    ],
)
def test_who_computes_fp4(pair, fp4, cuda, numerics):
    assert check(candidate(pair, fp4=fp4), SMOLLM2, cuda) == Capability(numerics, True, ())


@pytest.mark.parametrize(
    "overlay", ["w_per_tensor", "w_per_out_channel", "w_per_in_channel", "recipe_match_channel_token"]
)
@pytest.mark.parametrize("fp4", ["mxfp4", "nvfp4"])
def test_fp4_needs_block_scales(overlay, fp4):
    with pytest.raises(
        Unsupported, match=f"wfp4_afp8/{overlay}: FP4 weights need block scales .*; use quant_granularity"
    ):
        check(candidate("wfp4_afp8", overlay, fp4), {}, cuda=True)


@pytest.mark.parametrize("overlay", ["w_group64", "w_group128", "w_group128_a_token"])
def test_mx_blocks_are_those_of_the_kernel(overlay):
    with pytest.raises(
        Unsupported, match=r"one dynamic E8M0 scale per 8, 16, 32 values of a row, not \{-1: (64|128)\}; use"
    ):
        check(candidate("wfp4_afp16", overlay), {}, cuda=True)


@pytest.mark.parametrize("overlay", ["w_group32", "w_group64", "w_group128"])
def test_nvfp4_blocks_are_16(overlay):
    with pytest.raises(Unsupported, match=r"NVFP4 has one E4M3 scale per 16 values .* mislabelled; use \{-1: 16\}"):
        check(candidate("wfp4_aint8", overlay, "nvfp4"), {}, cuda=True)


def test_an_nvfp4_block_of_the_users_is_refused():
    pair = replace(PAIRS["wfp4_afp8"], format=mtq.W4A8_NVFP4_FP8_CFG)
    with pytest.raises(Unsupported, match=r"so \{-1: 32\} would be mislabelled"):
        check(resolve_candidate(pair, NOTHING), {}, cuda=True)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"num_bits": (3, 2), "block_sizes": {-1: 32, **MX}}, "MX weights other than FP4 and FP8 need ModelOpt's CUDA"),
        ({"num_bits": 8, "block_sizes": {-1: 32, **MX}}, "MX weights other than FP4 and FP8 need ModelOpt's CUDA"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(weight, message):
    made = custom(weight)
    check(made, {}, cuda=True)
    with pytest.raises(Unsupported, match=message):
        check(made, {}, cuda=False)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"num_bits": (2, 1), "block_sizes": {-1: 32, **MX, "type": "static"}}, "MX weights have one dynamic E8M0"),
        ({"num_bits": 4, "block_sizes": {-1: 32, **MX}}, "MX weights hold floats or 8-bit integers, not INT4"),
        ({"num_bits": (2, 1), "block_sizes": {-1: None, **MX}}, "FP4 weights need block scales"),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16}}, "FP4 weights need block scales"),
        ({"num_bits": (2, 1), "block_sizes": {-2: 16, **NV}}, "would be mislabelled"),
        ({"num_bits": 8, "block_sizes": {-1: 16, **NV}}, r"scale_bits \(4, 3\) with num_bits 8 is no format"),
        ({"num_bits": (3, 2), "block_sizes": {-1: 16, "type": "dynamic"}}, "E3M2 runs with MX block scales only"),
        (
            {"num_bits": 8, "block_sizes": {-2: 16, "type": "dynamic"}},
            r"dynamic blocks along \{-2: 16\} are not computed",
        ),
        ({"num_bits": 8, "backend": "not_there"}, "backend 'not_there' is not registered with ModelOpt; import"),
    ],
)
def test_what_no_kernel_computes_is_refused(weight, message):
    with pytest.raises(Unsupported, match=message) as error:
        check(custom(weight), {}, cuda=True)
    assert str(error.value).startswith("mine: ")
    assert "\n" not in str(error.value)


def test_a_registered_backend_is_taken():
    register_backend()
    assert check(custom({"num_bits": 8, "backend": "layerbits_token_group"}), {}, cuda=False).deployable


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (
            {"num_bits": 8, "block_sizes": {-1: 128}},
            "static blocks of activations refuse a batch of another shape .* a_group128",
        ),
        ({"num_bits": 8, "block_sizes": {-1: 128}, "type": "dynamic"}, "static blocks of activations"),
        ({"num_bits": 8, "block_sizes": {-1: None}}, "a static scale per row or token .* use type: dynamic"),
        ({"num_bits": 8, "block_sizes": {-1: None, "type": "dynamic"}}, "a static scale per row or token"),
        ({"num_bits": 8, "axis": 0}, "a static scale per row or token"),
        ({"num_bits": (4, 3), "axis": (-2, -1)}, "a static scale per row or token"),
    ],
)
def test_activation_scales_that_fit_one_shape_are_refused(activation, message):
    with pytest.raises(Unsupported, match=message):
        check(custom({"num_bits": 8, "axis": 0}, activation), {}, cuda=False)


@pytest.mark.parametrize(
    "activation",
    [
        {"num_bits": 8, "axis": (0, 1), "type": "dynamic"},
        {"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"},
        {"num_bits": 8, "block_sizes": {-1: 64, "type": "dynamic"}, "type": "dynamic"},
        {"num_bits": 8},
    ],
)
def test_activation_scales_that_fit_any_shape_pass(activation):
    assert check(custom({"num_bits": 8, "axis": 0}, activation), {}, cuda=False) == Capability("none", True, ())


def test_a_group_that_divides_no_width_names_linears_and_sizes():
    capability = check(candidate("wint4_afp16"), SMOLLM2, cuda=False)
    assert not capability.deployable
    assert capability.notes == (
        "weights: groups of 128 do not divide the inputs of model.layers.0.self_attn.q_proj and 1 more (576); "
        "sizes that would do: 64, 32, 16",
    )


def test_the_sizes_that_would_do_hold_for_every_linear():
    (note,) = check(candidate("wint8_afp8", "a_group128"), {"a": (8, 576), "b": (8, 1104)}, cuda=False).notes
    assert note == "activations: groups of 128 do not divide the inputs of a (576), b (1104); sizes that would do: 16"


def test_no_size_may_do():
    (note,) = check(candidate("wint8_afp8", "w_group32"), {"a": (8, 100)}, cuda=False).notes
    assert note.endswith("do not divide the inputs of a (100); no common size would do")


def test_fixed_blocks_offer_another_format():
    (note,) = check(candidate("wfp4_afp16"), {"a": (8, 100)}, cuda=False).notes
    assert note == "weights: groups of 32 do not divide the inputs of a (100); use a format without these blocks"


def test_blocks_along_the_outputs_are_held_against_them():
    made = custom({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}})
    (note,) = check(made, {"a": (192, 256)}, cuda=False).notes
    assert "do not divide the outputs of a (192)" in note


@pytest.mark.parametrize(
    ("overlay", "what"), [("w_per_in_channel", "weights"), ("a_per_hidden_channel", "activations")]
)
def test_a_scale_per_input_channel_cannot_be_served(overlay, what):
    capability = check(candidate("wint8_aint8", overlay), SMOLLM2, cuda=False)
    assert not capability.deployable
    assert capability.notes[0].startswith(f"{what}: a scale per input channel lies along the dimension")


def test_whole_dimension_blocks_count_as_the_axis_that_they_leave():
    assert not check(custom({"num_bits": 8, "block_sizes": {-2: None}}), SMOLLM2, cuda=False).deployable
    assert check(custom({"num_bits": 8, "block_sizes": {-1: None}}), SMOLLM2, cuda=False).deployable


def test_strict_refuses_what_cannot_be_served():
    with pytest.raises(
        Unsupported, match=r"wint4_afp16: weights: groups of 128 .*; strict=false scores it all the same"
    ):
        check(candidate("wint4_afp16"), SMOLLM2, cuda=False, strict=True)


def test_strict_lets_the_rest_pass():
    assert check(candidate("wint4_afp16", "w_group64"), SMOLLM2, cuda=False, strict=True).deployable


@pytest.mark.parametrize("kind", ["router", "conv"])
def test_what_runtimes_keep_in_16_bits_is_scored_with_a_note_and_refused_where_it_must_be_served(kind):
    found = check(candidate("wfp8_afp8"), SMOLLM2, False, kinds={"model.layers.0.x": kind, "model.layers.1.x": kind})
    assert not found.deployable
    (note,) = found.notes
    assert note.startswith("model.layers.0.x and 1 more: runtimes keep")
    with pytest.raises(Unsupported, match="strict=false"):
        check(candidate("wfp8_afp8"), SMOLLM2, False, strict=True, kinds={"model.layers.0.x": kind})
