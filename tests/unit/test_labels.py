"""Which label says what a candidate is, and which candidates have none."""

import pytest
import yaml

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.table import CONFIGS
from layerbits.checkpoint.labels import LABELS, check_shape, label_of, label_of_layer
from layerbits.errors import Unsupported


def info(pair, overlay="default", variant="mxfp4"):
    mapping = yaml.safe_load((CONFIGS / "quant_pair" / f"{pair}.yaml").read_text())
    over = yaml.safe_load((CONFIGS / "quant_granularity" / f"{overlay}.yaml").read_text())
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
    assert label_of(info(pair, overlay, variant)).algo == algo


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
        label_of(info(pair, overlay, variant))


def test_per_channel_int4_has_no_label():
    with pytest.raises(Unsupported, match="ModelOpt has no label for it"):
        label_of(info("wint4_afp16", "w_per_out_channel"))


def test_the_group_size_is_part_of_the_label():
    label = label_of(info("wint4_afp16", "w_group32"))
    assert label.scale_shape(64, 128) == (64, 4)
    assert label_of_layer({"quant_algo": "W4A16_AWQ", "group_size": 32}) == label


@pytest.mark.parametrize("layer", [{"quant_algo": "FANCY"}, {"quant_algo": "NVFP4", "group_size": 32}, {}])
def test_a_label_that_is_not_understood_is_refused(layer):
    with pytest.raises(Unsupported, match="quant_algo"):
        label_of_layer(layer)


def test_cut_blocks_are_refused():
    made = info("wint4_afp16")
    with pytest.raises(Unsupported, match="96 columns, not a multiple of 128"):
        check_shape(made, label_of(made), "layer", 64, 96)
    check_shape(made, label_of(made), "layer", 64, 256)


def test_every_label_is_read_as_it_is_named():
    for algo, label in LABELS.items():
        assert label_of_layer({"quant_algo": algo, "group_size": label.block or None}) == label
