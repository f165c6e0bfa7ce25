"""What a linear is to its block, by where it lies; names where there is nothing else."""

import pytest
import torch
from torch.nn import Conv1d, Linear, Module, ModuleList, Parameter

from layerbits.candidates.formats import resolve_format
from layerbits.inputs.kinds import kind_by_name, kind_of
from layerbits.scoring.groups import named_groups


def module(own=(), **children):
    """A module with empty parameters and some children."""
    made = Module()
    for name in own:
        made.register_parameter(name, Parameter(torch.empty(4)))
    for name, child in children.items():
        made.add_module(name, child)
    return made


def model(**block):
    """A model of one block."""
    made = module(model=module(layers=ModuleList([module(**block)])))
    made.config = type("Config", (), {})()
    return made


def kind(made, name):
    return kind_of(made, [f"model.layers.0.{name}"], None)


def experts():
    made = module()
    made.gate_up_proj = Parameter(torch.empty(4, 16, 8))
    return made


def linears(*names, out=8, into=8):
    return {name: Linear(into, out) for name in names}


@pytest.mark.parametrize(
    ("parent", "names", "expected"),
    [
        ("mixer", ("q_proj", "k_proj", "v_proj"), "qkv"),  # an attention that is not called one
        ("attn", ("c_attn",), "qkv"),
        ("attn", ("c_proj",), "o"),
        ("attn", ("gate_proj",), "qkv"),  # an attention's gate, under the name of an MLP's
        ("self_attention", ("dense",), "o"),
        ("mlp", ("c_proj",), "down"),
        ("mlp", ("dense_h_to_4h",), "gate_up"),
        ("mlp", ("gate_proj", "up_proj"), "gate_up"),
        ("ff", ("wo",), "down"),
        ("shared_mlp", ("output_linear",), "shared_down"),
    ],
)
def test_where_a_linear_lies_says_what_its_name_means(parent, names, expected):
    made = model(**{parent: module(**linears(*names))})
    assert {kind(made, f"{parent}.{name}") for name in names} == {expected}


@pytest.mark.parametrize(("out", "into", "expected"), [(16, 8, "gate_up"), (8, 16, "down"), (8, 8, "other")])
def test_widths_decide_where_the_name_in_an_mlp_is_unknown(out, into, expected):
    assert kind(model(mlp=module(**linears("expand", out=out, into=into))), "mlp.expand") == expected


def test_latent_attention_is_told_by_what_lies_beside():
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    made = model(self_attn=module(**linears(*names)))
    assert [kind(made, f"self_attn.{n}") for n in names] == ["mla_q", "mla_q", "mla_kv", "mla_kv", "o"]


@pytest.mark.parametrize(("own", "expected"), [(("A_log", "D"), "ssm"), (("A_log",), "linear_attn"), ((), "ssm")])
def test_mixers_are_told_by_their_parameters(own, expected):
    inside = {"conv1d": Conv1d(8, 8, 4), **linears("in_proj", "out_proj")}
    made = model(mixer=module(own, **inside))
    assert [kind(made, f"mixer.{n}") for n in inside] == ["conv", f"{expected}_in", f"{expected}_out"]


def test_linear_attention_without_a_decay_is_told_by_the_configuration():
    made = model(self_attn=module(**linears("qkv_proj", "out_proj")))
    assert kind(made, "self_attn.qkv_proj") == "qkv"
    made.config.layer_types = ["linear_attention"]
    assert kind(made, "self_attn.qkv_proj") == "linear_attn_in"
    assert kind(made, "self_attn.out_proj") == "linear_attn_out"


def test_what_lies_beside_experts_is_shared_or_chooses_them():
    made = model(
        ffn=module(
            bank=experts(),
            chooser=Linear(8, 4),
            weigher=Linear(8, 1),
            gate=module(wg=Linear(8, 4)),
            always=module(**linears("up_proj", "down_proj")),
        )
    )
    names = ("bank", "chooser", "weigher", "gate.wg", "always.up_proj", "always.down_proj")
    found = {n: kind(made, f"ffn.{n}") for n in names}
    assert found == {
        "bank": "experts",
        "chooser": "router",
        "weigher": "router",
        "gate.wg": "router",
        "always.up_proj": "shared_gate_up",
        "always.down_proj": "shared_down",
    }


def test_experts_of_their_own_are_experts():
    made = model(ffn=module(parts=ModuleList(module(**linears("w1", "w2", "w3")) for _ in range(4))))
    assert kind(made, "ffn.parts.3.w2") == "experts"


def test_names_alone_say_the_same_of_usual_models():
    names = [
        *(f"self_attn.{n}" for n in ("q_a_proj", "kv_b_proj", "o_proj")),
        *("mlp.experts.0.up_proj", "mlp.gate", "mlp.shared_experts.down_proj", "mlp.gate_proj"),
        *("linear_attn.in_proj_qkvz", "linear_attn.out_proj", "mamba.x_proj", "mamba.out_proj", "mamba.conv1d"),
    ]
    full = [f"model.layers.0.{name}" for name in names]
    assert [kind_by_name([name], "lm_head", full) for name in full] == [
        *("mla_q", "mla_kv", "o", "experts", "router", "shared_down", "gate_up"),
        *("linear_attn_in", "linear_attn_out", "ssm_in", "ssm_out", "conv"),
    ]


def test_a_group_has_the_same_name_whatever_is_searched_beside_it():
    made = model(self_attn=module(**linears("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")), mlp=module())
    fused = [((f"model.layers.0.self_attn.{n}",), 64) for n in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")]
    assert [g.key for g in named_groups(made, fused, None)] == [
        "B00.q_a_proj",
        "B00.q_b_proj",
        "B00.kv_b_proj",
        "B00.o",
    ]


@pytest.mark.parametrize("kind", ["conv", "router"])
def test_presets_leave_out_convolutions_and_routers_under_any_name(kind):
    name = "model.layers.0.mamba.thing"
    assert resolve_format("FP8_DEFAULT_CFG").linear.covers(name)
    assert not resolve_format("FP8_DEFAULT_CFG").linear.covers(name, kind=kind)
    assert resolve_format("FP8_ALL_LAYERS_CFG").linear.covers(name, kind=kind)
