"""What a scored module is to its decoder block: one of :data:`layerbits.results.result.KINDS`.

Where a module lies decides first (beside experts, in a state-space mixer, in an attention), because its own name may
mean several things: ``dense`` is an attention's output in GPT-NeoX, ``out_proj`` one of a mixer in Jamba, ``c_proj``
either in GPT-2. Only within an MLP and between the sides of a mixer do leaf names decide, widths where they are
unknown. Without a model (an imported table), names have to tell where a module lies; that part needs no torch, so what
looks into a model imports it there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_QKV = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "query", "key", "value", "query_key_value"),
        *("c_attn", "Wqkv", "wqkv", "wq", "wk", "q_a_proj", "kv_b_proj"),
    )
)
"""Leaves of which one makes its parent an attention, whatever the parent is called."""

_OUT = frozenset(
    (
        *("o_proj", "out_proj", "dense", "c_proj", "wo", "proj", "proj_out", "linear_out", "fc_out", "to_out"),
        *("projection_layer", "o", "out"),
    )
)
"""Leaves that lead from a token mixer back to the residual stream."""

_SIDES = {
    "gate_up": frozenset(
        (
            *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "v1", "w13", "fc1", "fc_in", "c_fc", "lin1", "up"),
            *("dense_h_to_4h", "wi", "wi_0", "wi_1", "linear_1", "linear_fc1", "input_linear"),
        )
    ),
    "down": frozenset(
        (
            "down_proj",
            "w2",
            "fc2",
            "fc_out",
            "c_proj",
            "dense_4h_to_h",
            "wo",
            "lin2",
            "linear_2",
            "linear_fc2",
            "output_linear",
            "down",
        )
    ),
}
"""Leaves on either side of an MLP."""

_OUTSIDE: WeakKeyDictionary[nn.Module, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()
"""Model → name of its language model and of foreign parts within: looking for them takes milliseconds."""
_MERGERS = ("merger", "projector", "connector")
_MAMBA = frozenset(("x_proj", "dt_proj", "conv1d"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
_IN_A_LIST = re.compile(r"^(?P<list>[^.]+(?:\.[^.\d][^.]*)*)\.(?P<block>\d+)\.(?P<inner>.+)$")


@dataclass(frozen=True)
class Place:
    """Where a module lies.

    Attributes:
        blocks: Name of the outermost list of modules that holds it, empty where none does.
        block: Its position there.
    """

    blocks: str
    block: int | None


@dataclass(frozen=True)
class _Facts:
    """What decides on a module in a block.

    Attributes:
        what: ``experts``, ``conv`` or ``router`` where it is one.
        mixer: ``ssm`` or ``linear_attn`` where it lies in one.
        attention: Names of the modules beside it where it lies in an attention.
        shared: Whether it is part of an expert that every token takes.
        shape: Outputs and inputs, where they are known.
    """

    what: str = ""
    mixer: str = ""
    attention: Collection[str] = ()
    shared: bool = False
    shape: tuple[int, int] | None = None


def place_of(name: str) -> Place:
    """Finds the decoder block of a module."""
    match = _IN_A_LIST.match(name)
    return Place(match["list"], int(match["block"])) if match else Place("", None)


def kind_of(model: PreTrainedModel, modules: Sequence[str], head: str | None) -> str:
    """Kind of modules that share a decision.

    Args:
        model: The whole model, converted by ModelOpt or not.
        modules: Their names.
        head: Name of the output head.
    """
    outside = outside_of_language_model(model, modules, head)
    return _common(
        _vision_kind(_kind(n, head, lambda n: _facts(model, n)), n) if n in outside else
        _kind(n, head, lambda n: _facts(model, n))
        for n in modules
    )  # fmt: skip


def outside_of_language_model(model: nn.Module, names: Sequence[str], head: str | None) -> list[str]:
    """Those of some modules that lie in a vision tower or lead out of it."""
    from layerbits.inputs.language_model import find_language_model, foreign_parts

    if not hasattr(model, "get_input_embeddings"):  # a part of a model
        return []
    if model not in _OUTSIDE:
        prefix = find_language_model(model)[0]
        _OUTSIDE[model] = prefix, tuple(f"{name}." for name in foreign_parts(model))
    prefix, foreign = _OUTSIDE[model]
    return [
        n for n in names if n != head and ((prefix and not n.startswith(f"{prefix}.")) or f"{n}.".startswith(foreign))
    ]


def _vision_kind(kind: str, name: str) -> str:
    """The kind of a linear outside the language model, from what it would be inside."""
    if place_of(name).block is None or any(word in part for part in name.split(".") for word in _MERGERS):
        return "merger"
    return {"qkv": "vision_qkv", "o": "vision_out", "gate_up": "vision_fc1", "down": "vision_fc2"}.get(kind, "other")


def kinds_of(model: PreTrainedModel, names: Sequence[str], head: str | None) -> dict[str, str]:
    """Each name's own :func:`kind_of`."""
    return {name: kind_of(model, [name], head) for name in names}


def kind_by_name(modules: Sequence[str], head: str | None, known: Collection[str]) -> str:
    """As :func:`kind_of`, from names alone.

    Args:
        modules: Names that share a decision.
        head: Name of the output head.
        known: Names of all modules of the model.
    """
    return _common(_kind(name, head, lambda n: _named_facts(n, known)) for name in modules)


def _common(kinds: Iterator[str]) -> str:
    distinct = set(kinds)
    return distinct.pop() if len(distinct) == 1 else "other"


def _kind(name: str, head: str | None, facts_of: Callable[[str], _Facts]) -> str:
    if name == head:
        return "lm_head"
    if place_of(name).block is None:
        return "other"
    facts = facts_of(name)
    leaf = name.rpartition(".")[2]
    if facts.what:
        return facts.what
    if facts.mixer:
        return f"{facts.mixer}_out" if leaf in _OUT else f"{facts.mixer}_in"
    if facts.attention:
        return _attention_kind(leaf, facts.attention)
    side = next((side for side, leaves in _SIDES.items() if leaf in leaves), None)
    if side is None and facts.shape is not None and facts.shape[0] != facts.shape[1]:
        side = "gate_up" if facts.shape[0] > facts.shape[1] else "down"
    return "other" if side is None else f"shared_{side}" if facts.shared else side


def _attention_kind(leaf: str, beside: Collection[str]) -> str:
    if leaf in _OUT:
        return "o"
    if not any(name.startswith("kv_") for name in beside):
        return "qkv"
    return "mla_kv" if leaf.startswith("kv_") else "mla_q" if leaf.startswith("q_") else "other"


def _facts(model: PreTrainedModel, name: str) -> _Facts:
    """What the model's structure says."""
    from layerbits.inputs.linears import is_convolution, is_quantizable, shape_of

    place = place_of(name)
    root, inner = f"{place.blocks}.{place.block}", name.removeprefix(f"{place.blocks}.{place.block}.").split(".")
    module = model.get_submodule(name)
    above = [(inner[i - 1], model.get_submodule(".".join((root, *inner[:i])))) for i in range(1, len(inner))]
    if _experts_in(module) or any(part == "experts" or _experts_in(m) for part, m in above):
        return _Facts("experts")
    if is_convolution(module):
        return _Facts("conv")
    if mixer := _mixer(model, place, above):
        return _Facts(mixer=mixer)
    for part, m in above:
        beside = {child for child, _ in m.named_children()}
        if _is_attention(part, beside):
            return _Facts(attention=beside)
    shape = shape_of(module)
    shared = any("shared" in part for part in inner[:-1])
    for _, m in above:
        if experts := max(map(_experts_in, m.children()), default=0):
            part = next(child for child in m.children() if any(inside is module for inside in child.modules()))
            if shape[0] in (1, experts) and sum(map(is_quantizable, part.modules())) == 1:
                return _Facts("router")
            shared = True
    return _Facts(shared=shared, shape=shape)


def _named_facts(name: str, known: Collection[str]) -> _Facts:
    """What names alone say."""
    parts = name.split(".")
    parent = name.rpartition(".")[0]
    beside = {n.removeprefix(f"{parent}.").split(".")[0] for n in known if n.startswith(f"{parent}.")}
    if "experts" in parts:
        return _Facts("experts")
    if parts[-1] in _ROUTERS:
        return _Facts("router")
    if parts[-1] == "conv1d":
        return _Facts("conv")
    if "linear_attn" in parts:
        return _Facts(mixer="linear_attn")
    if "mamba" in parts or beside & _MAMBA:
        return _Facts(mixer="ssm")
    if _is_attention(parts[-2], beside):
        return _Facts(attention=beside)
    return _Facts(shared=any("shared" in part for part in parts[:-1]))


def _experts_in(module: nn.Module) -> int:
    """Experts that a module holds, as slices of one tensor or as a list of modules alike; 0 for any other module."""
    import torch

    from layerbits.inputs.linears import is_convolution

    if is_convolution(module):
        return 0
    if stacked := [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]:
        return int(max(stacked))
    if not isinstance(module, torch.nn.ModuleList) or len(module) < 2 or len({type(m) for m in module}) > 1:
        return 0
    first = module[0]
    return len(module) if any(isinstance(m, torch.nn.Linear) for m in first.modules() if m is not first) else 0


def _mixer(model: PreTrainedModel, place: Place, above: Sequence[tuple[str, nn.Module]]) -> str:
    """``ssm`` or ``linear_attn`` where a module lies in such a mixer.

    Both have a decay per head (``A_log``); a state space has the skip ``D`` besides, or a short convolution alone.
    Linear attention that keeps its decay elsewhere is known by the configuration's ``layer_types``.
    """
    from layerbits.inputs.linears import is_convolution

    for part, module in above:
        own = {n for n, _ in module.named_parameters(recurse=False)}
        if "A_log" in own:
            return "ssm" if "D" in own else "linear_attn"
        if any(is_convolution(child) for child in module.children()):
            return "ssm"
        beside = {child for child, _ in module.named_children()}
        if _is_attention(part, beside) and _layer_type(model, place) == "linear_attention":
            return "linear_attn"
    return ""


def _layer_type(model: PreTrainedModel, place: Place) -> str | None:
    config = getattr(model.config, "text_config", model.config)
    types = getattr(config, "layer_types", None) or ()
    if place.block is None or len(model.get_submodule(place.blocks)) != len(types):  # of another tower
        return None
    return str(types[place.block])


def _is_attention(name: str, children: Collection[str]) -> bool:
    return "attn" in name.lower() or "attention" in name.lower() or any(child in _QKV for child in children)
