"""Which label says what a candidate is, and which candidates have none."""

import pytest
import yaml

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.shipped import shipped_configs
from layerbits.checkpoint import compressed
from layerbits.checkpoint.formats import choose_format
from layerbits.checkpoint.label import AUTO, COMPRESSED, MODELOPT
from layerbits.checkpoint.labels import check_shape, label_of
from layerbits.checkpoint.modelopt import LABELS, label_of_layer
from layerbits.checkpoint.runtimes import refused_modules
from layerbits.errors import Unsupported, UserError


def info(pair, overlay="default", variant="mxfp4"):
    mapping = yaml.safe_load((shipped_configs() / "quant_pair" / f"{pair}.yaml").read_text())
    over = yaml.safe_load((shipped_configs() / "quant_granularity" / f"{overlay}.yaml").read_text())
    made = resolve_candidate(QuantPair.from_mapping(mapping), Overlay.from_mapping(over), variant, experimental=True)
    return made.info


@pytest.mark.parametrize(
    ("pair", "overlay", "variant", "algo"),
    [
        ("wfp8_afp8", "default", "mxfp4", "FP8"),
        ("wfp8_afp8", "recipe_match_channel_token", "mxfp4", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("wint8_afp16", "default", "mxfp4", "W8A16"),
        ("wint8_aint8", "default", "mxfp4", "W8A8_SQ_PER_CHANNEL"),
        ("wint4_afp16", "default", "mxfp4", "W4A16_AWQ"),
        ("wfp4_afp16", "default", "nvfp4", "W4A16_NVFP4"),
        ("wfp4_afp8", "default", "nvfp4", "W4A8_NVFP4_FP8"),
        ("wfp4_afp8", "default", "mxfp4", "W4A8_MXFP4_FP8"),
    ],
)
def test_a_candidate_gets_the_label_that_says_what_it_is(pair, overlay, variant, algo):
    assert label_of(info(pair, overlay, variant), MODELOPT).algo == algo


@pytest.mark.parametrize(
    ("pair", "overlay", "variant", "would_be"),
    [
        ("wint8_afp8", "default", "mxfp4", "W8A8_SQ_PER_CHANNEL"),
        ("wfp8_afp16", "default", "mxfp4", "FP8"),
        ("wfp8_aint8", "default", "mxfp4", "FP8"),
        ("wint4_aint8", "default", "mxfp4", "W4A16_AWQ"),
        ("wint4_afp8", "default", "mxfp4", "W4A16_AWQ"),
        ("wfp4_aint8", "default", "nvfp4", "NVFP4"),
        ("wfp4_afp16", "default", "mxfp4", "mxfp4"),
        ("wfp8_afp8", "a_per_token_dynamic", "mxfp4", "FP8"),
    ],
)
def test_a_label_that_would_lie_is_refused_by_name(pair, overlay, variant, would_be):
    with pytest.raises(Unsupported, match=f"would label it {would_be}, which .* stays available as fake quantization"):
        label_of(info(pair, overlay, variant), MODELOPT)


def test_per_channel_int4_has_no_label():
    with pytest.raises(Unsupported, match="ModelOpt has no label for it"):
        label_of(info("wint4_afp16", "w_per_out_channel"), MODELOPT)


def test_the_group_size_is_part_of_the_label():
    label = label_of(info("wint4_afp16", "w_group32"), MODELOPT)
    assert label.layout.parts(64, 128)["weight_scale"][1] == (64, 4)
    assert label_of_layer({"quant_algo": "W4A16_AWQ", "group_size": 32}) == label


@pytest.mark.parametrize("layer", [{"quant_algo": "FANCY"}, {"quant_algo": "NVFP4", "group_size": 32}, {}])
def test_a_label_that_is_not_understood_is_refused(layer):
    with pytest.raises(Unsupported, match="quant_algo"):
        label_of_layer(layer)


def test_cut_blocks_are_refused():
    made = info("wint4_afp16")
    with pytest.raises(Unsupported, match="96 columns, not a multiple of 128"):
        check_shape(made, label_of(made, MODELOPT), "layer", 64, 96)
    check_shape(made, label_of(made, MODELOPT), "layer", 64, 256)


def test_every_label_is_read_as_it_is_named():
    for algo, label in LABELS.items():
        assert label_of_layer({"quant_algo": algo, "group_size": label.layout.block or None}) == label


@pytest.mark.parametrize(
    ("pair", "overlay", "variant", "algo", "storage"),
    [
        ("wint8_aint8", "recipe_match_channel_token", "mxfp4", "INT8_CHANNEL-INT8_TOKEN", "int-quantized"),
        ("wint8_aint8", "default", "mxfp4", "INT8_CHANNEL-INT8_TENSOR", "int-quantized"),
        ("wint8_afp16", "default", "mxfp4", "INT8_CHANNEL-A16", "pack-quantized"),
        ("wint4_afp16", "w_group32", "mxfp4", "INT4_GROUP32-A16", "pack-quantized"),
        ("wint4_afp8", "a_per_token_dynamic", "mxfp4", "INT4_GROUP128-FP8_TOKEN", "pack-quantized"),
        ("wint4_aint8", "a_per_token_dynamic", "mxfp4", "INT4_GROUP128-INT8_TOKEN", "int-quantized"),
        ("wfp8_afp8", "default", "mxfp4", "FP8_TENSOR-FP8_TENSOR", "float-quantized"),
        ("wfp8_afp8", "recipe_match_channel_token", "mxfp4", "FP8_CHANNEL-FP8_TOKEN", "float-quantized"),
        ("wfp8_afp16", "default", "mxfp4", "FP8_TENSOR-A16", "float-quantized"),
        ("wfp4_afp16", "default", "nvfp4", "NVFP4-A16", "nvfp4-pack-quantized"),
        ("wfp4_afp16", "default", "mxfp4", "MXFP4-A16", "mxfp4-pack-quantized"),
        ("wfp4_afp8", "a_per_token_dynamic", "mxfp4", "MXFP4-FP8_TOKEN", "mxfp4-pack-quantized"),
        ("wfp4_afp4", "default", "nvfp4", "NVFP4-NVFP4", "nvfp4-pack-quantized"),
        ("wmxfp8_amxfp8", "default", "mxfp4", "MXFP8-MXFP8", "mxfp8-quantized"),
    ],
)
def test_compressed_tensors_says_weights_and_activations_apart(pair, overlay, variant, algo, storage):
    label = label_of(info(pair, overlay, variant), COMPRESSED)
    assert (label.algo, compressed.storage(label)) == (algo, storage)
    assert compressed.label_of_group(compressed.scheme_of(label)) == label


SCHEMES = [
    label
    for weights in (*compressed.WEIGHTS, "INT4 per group of 64", "INT8 per group of 128")
    for inputs in ("-", *compressed.INPUTS)
    if (label := compressed.find(weights, inputs)) is not None
]


@pytest.mark.parametrize("label", SCHEMES, ids=[label.algo for label in SCHEMES])
def test_every_scheme_of_ours_is_one_of_the_library(label):
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], **compressed.scheme_of(label))
    names = set(BaseCompressor.get_value_from_registry(scheme.format).compression_param_names(scheme))
    names -= {"input_global_scale", "weight_global_scale"}  # 0.17 names them for schemes that have none as well
    assert names <= set(label.parts)
    assert compressed.label_of_group(scheme.model_dump(mode="json")) == label


@pytest.mark.parametrize(
    ("pair", "overlay", "says"),
    [
        ("wint8_afp8", "a_per_token_dynamic", "would take 8-bit activations of INT8 weights for INT8"),
        ("wfp8_aint8", "default", "would leave the activations of FP8 weights untouched"),
        ("wfp4_aint8", "default", "take MXFP4 weights with such activations for MXFP4"),
        ("wint4_afp16", "w_per_in_channel", "no layout for that"),
    ],
)
def test_what_a_runtime_would_take_for_something_else_is_refused(pair, overlay, says):
    with pytest.raises(Unsupported, match=says):
        label_of(info(pair, overlay), COMPRESSED)


@pytest.mark.parametrize(
    ("pairs", "format"),
    [
        (["wfp8_afp8"], MODELOPT),
        (["wint8_afp16"], COMPRESSED),  # ModelOpt's label is one that vLLM refuses
        (["wfp8_afp8", "wint8_afp16"], COMPRESSED),
    ],
)
def test_auto_is_the_format_that_vllm_reads(pairs, format):
    chosen, labels = choose_format([info(pair) for pair in pairs], AUTO)
    assert chosen == format
    assert list(labels) == pairs


def test_auto_is_the_format_in_which_every_vllm_reads_a_mix():
    by_token, nvfp4 = info("wfp8_afp8", "recipe_match_channel_token"), info("wfp4_afp16", variant="nvfp4")
    assert choose_format([by_token], AUTO)[0] == MODELOPT
    assert choose_format([by_token, nvfp4], AUTO)[0] == COMPRESSED  # vLLM 0.26.0 refuses that mix of ModelOpt's labels
    assert choose_format([by_token, nvfp4], MODELOPT)[0] == MODELOPT
    assert choose_format([info("wfp8_afp8"), nvfp4], AUTO)[0] == MODELOPT


def test_auto_says_of_each_format_why_not():
    with pytest.raises(Unsupported, match=r"as modelopt: .* as compressed-tensors: .* stays available"):
        choose_format([info("wfp8_aint8")], AUTO)


@pytest.mark.parametrize("change", [{"format": "int-quantized"}, {"weights": {"num_bits": 4}}, {"weights": None}])
def test_a_damaged_config_group_is_refused(change):
    group = compressed.scheme_of(compressed.find("INT4 per group of 128", "-"))
    with pytest.raises(UserError):
        compressed.label_of_group({**group, **change})


def test_vllm_takes_some_towers_for_16_bits_where_there_is_one_label():
    tower = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    algos = {"model.language_model.layers.0.mlp.down_proj": "FP8", tower: "FP8"}
    (line,) = refused_modules(MODELOPT, algos)
    assert line.startswith(f"vLLM takes {tower} for 16 bits")
    assert line.endswith("use format=compressed-tensors")
    assert refused_modules(COMPRESSED, algos) == []
    assert refused_modules(MODELOPT, {**algos, tower: "NVFP4"}) == []
    assert refused_modules(MODELOPT, {"model.visual.blocks.0.attn.proj": "FP8"}) == []


@pytest.mark.parametrize("format", [MODELOPT, COMPRESSED])
def test_vllm_has_no_quantized_head_of_some_models(format):
    algos = {"lm_head": "FP8", "model.decoder.layers.0.fc1": "FP8"}
    (line,) = refused_modules(format, algos, "OPTForCausalLM")
    assert line.startswith("vLLM has no quantized output head for OPTForCausalLM")
    assert refused_modules(format, algos, "LlamaForCausalLM") == []
    assert refused_modules(format, {"model.decoder.layers.0.fc1": "FP8"}, "OPTForCausalLM") == []
