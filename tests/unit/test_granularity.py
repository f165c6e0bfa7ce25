import contextlib
import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from omegaconf import OmegaConf

from layerbits.candidates.formats import Format, normalise, plain, resolve_format
from layerbits.candidates.granularity import (
    TOKEN_GROUP_BACKEND,
    Overlay,
    apply_overlay,
    register_backend,
    with_token_groups,
)
from layerbits.candidates.linear import INPUT, WEIGHT, read_config
from layerbits.candidates.shipped import load_overlays, shipped_configs
from layerbits.errors import UserError

OFF = {"quantizer_name": "*", "enable": False}
FORMATS = (
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_MLP_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "INT8_ALL_LAYERS_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "MXFP4_DEFAULT_CFG",
    "W4A8_NVFP4_FP8_CFG",
    "NVFP4_MLP_ONLY_CFG",
)


def overlay(weight=None, activation=None):
    overrides = {"*weight_quantizer": weight, "*input_quantizer": activation}
    return Overlay.from_mapping(
        {"name": "test", "quant_cfg_overrides": {k: v for k, v in overrides.items() if v is not None}}
    )


def edited(cfg, weight):
    config = {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": cfg}], "algorithm": "max"}
    return read_config(apply_overlay(Format("test", config), overlay(weight))).cfgs[WEIGHT]


def knobs(rank):
    axis = st.integers(-rank, rank - 1)
    lengths = st.dictionaries(
        st.one_of(axis, axis.map(str)), st.one_of(st.none(), st.sampled_from((16, 32, 128))), min_size=1, max_size=1
    )
    return st.fixed_dictionaries(
        {},
        optional={"type": st.sampled_from(("static", "dynamic"))},
    ).flatmap(
        lambda some: st.one_of(
            st.just(some),
            axis.map(lambda a: {**some, "axis": a}),
            axis.map(lambda a: {**some, "axis": a, "block_sizes": None}),
            lengths.map(lambda b: {**some, "block_sizes": b}),
            lengths.map(lambda b: {**some, "axis": None, "block_sizes": {**b, "type": "dynamic"}}),
            st.just({**some, "axis": None, "block_sizes": None}),
        )
    )


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), knobs(2), knobs(3))
def test_any_overlay_is_idempotent_accepted_by_modelopt_and_leaves_the_format_alone(name, weight, activation):
    config = resolve_format(name).config
    before, laid = copy.deepcopy(config), overlay(weight, activation)
    once = apply_overlay(Format("test", config), laid)
    assert config == before
    assert apply_overlay(Format("test", once), laid) == once
    QuantizeConfig(**once)
    for quantizer, cfg in read_config(config).cfgs.items():
        after = read_config(once).cfgs[quantizer]
        assert (cfg is None) == (after is None)
        assert cfg is None or after.get("num_bits") == cfg.get("num_bits")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(mtq.config.choices)), knobs(2))
def test_presets_stay_as_they_are(name, weight):
    before = copy.deepcopy(getattr(mtq, name))
    with contextlib.suppress(UserError):  # KV-cache and staged formats take no overlay
        apply_overlay(resolve_format(name), overlay(weight))
    assert getattr(mtq, name) == before


@pytest.mark.parametrize(
    ("cfg", "weight", "expected"),
    [
        ({"num_bits": 8, "axis": 0}, {"block_sizes": {-1: 64}}, {"num_bits": 8, "block_sizes": {-1: 64}}),
        ({"num_bits": 4, "block_sizes": {-1: 128}}, {"axis": 0}, {"num_bits": 4, "axis": 0}),
        ({"num_bits": 4, "block_sizes": {-1: 128}}, {"axis": 0, "block_sizes": None}, {"num_bits": 4, "axis": 0}),
        (
            {"num_bits": 8, "axis": 0},
            {"axis": None, "block_sizes": {"-1": 32}},
            {"num_bits": 8, "block_sizes": {-1: 32}},
        ),
        ({"num_bits": 8, "axis": 0}, {"axis": None, "block_sizes": None}, {"num_bits": 8}),
        ({"num_bits": 8, "axis": 0}, {"axis": None}, {"num_bits": 8}),
        ({"num_bits": 4, "block_sizes": {-1: 128}}, {"axis": None}, {"num_bits": 4, "block_sizes": {-1: 128}}),
        ({"num_bits": 8, "axis": 0}, {"type": "dynamic"}, {"num_bits": 8, "axis": 0, "type": "dynamic"}),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            {"block_sizes": {-1: 16}},
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (8, 0)}},
        ),
        (
            {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            {"block_sizes": {-1: None}},
            {"num_bits": (4, 3), "block_sizes": {-1: None}},
        ),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 16}, "effective_bits": 4.5},
            {"block_sizes": {-1: 32}},
            {"num_bits": (2, 1), "block_sizes": {-1: 32}},
        ),
    ],
)
def test_axis_and_block_sizes_exclude_each_other_and_block_words_stay(cfg, weight, expected):
    assert edited(cfg, weight) == expected


def test_an_overlay_edits_every_module_pattern_of_a_restricted_format():
    config = apply_overlay(resolve_format("NVFP4_MLP_ONLY_CFG"), overlay({"block_sizes": {-1: 32}}))
    assert read_config(config).cfgs[WEIGHT]["block_sizes"][-1] == 32


def test_a_disabled_quantizer_stays_disabled():
    config = resolve_format("INT8_WEIGHT_ONLY_CFG").config
    assert apply_overlay(Format("test", config), overlay(activation={"axis": None, "type": "dynamic"})) == config


def test_a_setting_that_a_later_entry_disables_is_not_touched():
    entries = [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}]
    entries += [{"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}}]
    entries += [{"quantizer_name": "*input_quantizer", "enable": False}]
    config = {"quant_cfg": entries, "algorithm": "max"}
    assert apply_overlay(Format("test", config), overlay(activation={"axis": -1})) == config


def test_an_entry_for_both_quantizers_is_refused():
    config = {"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": 8}}], "algorithm": "max"}
    with pytest.raises(UserError, match=r"weights and inputs in one entry \(\*\); spell out"):
        apply_overlay(Format("test", config), overlay({"axis": 0}))


def test_a_staged_quantizer_is_refused():
    with pytest.raises(UserError, match="has 2 stages and an overlay edits one; use quant_granularity=default"):
        apply_overlay(resolve_format("W4A8_AWQ_BETA_CFG"), overlay({"axis": 0}))


def test_another_dtype_of_the_scales_is_refused():
    laid = overlay({"block_sizes": {-1: 16, "scale_bits": [4, 3]}})
    with pytest.raises(UserError, match=r"would change the dtype of the scales .*; choose another quant pair"):
        apply_overlay(resolve_format("MXFP4_WEIGHT_ONLY_CFG"), laid)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {"num_bits": 4},
            r"num_bits is not granularity \(axis, block_sizes, type, shared\); to change the dtype choose another",
        ),
        ({"enable": True}, "enable is not granularity"),
        ({"axis": 2}, r"\*weight_quantizer: axis 2 is out of range for a Linear; use -2 to 1"),
        ({"axis": "rows"}, "axis 'rows' must be null, an integer or a list of integers"),
        ({"axis": True}, "axis True must be null"),
        ({"axis": []}, r"axis \[\] must be null"),
        ({"axis": [0, 1]}, "one scale per value"),
        ({"axis": 0, "block_sizes": {-1: 32}}, "axis and block_sizes exclude each other; set one of them to null"),
        ({"type": "online"}, "type 'online' is not known; use static or dynamic"),
        ({"type": None}, "type None is not known"),
        ({"block_sizes": 128}, r"block_sizes 128 must be null or a mapping such as \{-1: 128\}"),
        ({"block_sizes": {-3: 32}}, "block_sizes dimension -3 is out of range"),
        ({"block_sizes": {"last": 32}}, "key 'last' is neither a dimension nor one of type, scale_bits"),
        ({"block_sizes": {-1: 0}}, "block length 0 must be a positive integer, or null"),
        ({"block_sizes": {"type": "dynamic"}}, "block_sizes names no dimension; give one"),
        ({"block_sizes": {-1: 32, "type": "online"}}, "block_sizes type 'online' is not known"),
    ],
)
def test_a_bad_knob_is_refused(weight, message):
    with pytest.raises(UserError, match=message) as error:
        overlay(weight)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x"}, "granularity x needs exactly the keys name, quant_cfg_overrides; it has name"),
        ({"name": "x", "quant_cfg_overrides": {}, "axis": 0}, "it has name, quant_cfg_overrides, axis"),
        ({"name": "x", "quant_cfg_overrides": {"*output_quantizer": {}}}, r"\*output_quantizer is not one of \*weight"),
    ],
)
def test_a_bad_overlay_is_refused(mapping, message):
    with pytest.raises(UserError, match=message):
        Overlay.from_mapping(mapping)


@pytest.mark.parametrize("path", sorted((shipped_configs() / "quant_granularity").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_overlay_file_reads_through_hydras_loader(path):
    laid = Overlay.from_mapping(OmegaConf.to_container(OmegaConf.load(path)))
    assert laid.name == path.stem
    assert path.read_text().startswith("# ")


def test_the_shipped_overlays():
    assert [o.name for o in load_overlays()] == [
        "default",
        *("w_group32", "w_group64", "w_group128", "w_per_in_channel", "w_per_out_channel", "w_per_tensor", "w_shared"),
        *("a_group128", "a_per_hidden_channel", "a_per_tensor_dynamic", "a_per_tensor_static", "a_per_token_dynamic"),
        *("recipe_match_channel_token", "w_group128_a_token"),
    ]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"*weight_quantizer": {"shared": "yes"}}, "use true or false"),
        ({"*input_quantizer": {"shared": True}}, "one input"),
    ],
)
def test_a_shared_range_is_a_yes_or_no_of_weights(knobs, says):
    with pytest.raises(UserError, match=says):
        Overlay.from_mapping({"name": "mine", "quant_cfg_overrides": knobs})


def test_the_default_overlay_changes_nothing():
    config = resolve_format("FP8_DEFAULT_CFG").config
    assert (
        apply_overlay(Format("test", config), Overlay.from_mapping({"name": "default", "quant_cfg_overrides": {}}))
        == config
    )


class TestTokenGroups:
    """Our backend for dynamic scales per group of a token."""

    @staticmethod
    def quantizer(num_bits, size=128, **more):
        register_backend()
        cfg = {"num_bits": num_bits, "block_sizes": {-1: size, "type": "dynamic"}, "type": "dynamic", **more}
        return TensorQuantizer(mtq.config.QuantizerAttributeConfig(**cfg, backend=TOKEN_GROUP_BACKEND))

    @pytest.mark.parametrize("num_bits", [8, 4, (4, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_modelopts_dynamic_groups_at_the_one_shape_they_take(self, num_bits, dtype):
        x = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        cfg = {"num_bits": num_bits, "block_sizes": {-1: 128}, "type": "dynamic"}
        theirs = TensorQuantizer(mtq.config.QuantizerAttributeConfig(**cfg))
        assert torch.equal(self.quantizer(num_bits)(x), theirs(x))

    def test_takes_any_shape(self):
        quantizer = self.quantizer(8)
        for shape in ((2, 7, 256), (1, 5, 256), (3, 128), (1, 300)):
            assert quantizer(torch.randn(shape)).shape == shape

    def test_a_short_group_is_scaled_by_its_own_largest_value(self):
        x = torch.randn(1, 3, 192, generator=torch.Generator().manual_seed(0))
        whole = self.quantizer(8, 64)
        short = torch.cat([self.quantizer(8)(x[..., :128]), whole(x[..., 128:])], -1)
        assert torch.equal(self.quantizer(8)(x), short)

    def test_groups_do_not_see_each_other(self):
        x = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0))
        y = x.clone()
        y[..., 128:] *= 1000
        assert torch.equal(self.quantizer(8)(x)[..., :128], self.quantizer(8)(y)[..., :128])

    def test_a_zero_group_stays_zero(self):
        assert not self.quantizer((4, 3))(torch.zeros(1, 2, 128)).any()

    def test_the_gradient_passes_straight_through(self):
        x = torch.randn(1, 3, 192, requires_grad=True)
        self.quantizer(8)(x).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))

    def test_is_named_where_modelopt_has_no_kernel(self):
        config = apply_overlay(
            resolve_format("FP8_DEFAULT_CFG"),
            overlay(activation={"block_sizes": {-1: 128, "type": "dynamic"}, "type": "dynamic"}),
        )
        assert read_config(with_token_groups(config)).cfgs[INPUT]["backend"] == TOKEN_GROUP_BACKEND
        assert normalise(plain(with_token_groups(config))) == with_token_groups(config)

    @pytest.mark.parametrize("name", FORMATS)
    def test_is_not_named_elsewhere(self, name):
        config = resolve_format(name).config
        assert with_token_groups(config) == config
