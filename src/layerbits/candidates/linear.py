"""What a ModelOpt configuration gives a linear: its ordered list of entries, read once.

Every module that asks what a configuration does works on a :class:`LinearConfig` and not on the list itself.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypedDict, cast

from layerbits.errors import UserError
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.result import VISION_KINDS

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"
_LEFT_OUT = {"conv": "mixer.conv1d", "router": "router"}
"""Names by which ModelOpt's presets know what other families call otherwise."""
_TOWERS = ("vision", "visual", "projector", "merger", "connector")
"""What is in the patterns by which they leave out vision towers."""
QUANTIZERS = (WEIGHT, INPUT)
RANK = {WEIGHT: 2, INPUT: 3}
"""Rank of what each quantizer sees in a decoder: weights ``[out, in]``, activations ``[batch, tokens, in]``."""
FP8, FP4 = (4, 3), (2, 1)
E8M0, E4M3 = (8, 0), (4, 3)

Config: TypeAlias = JsonObject
"""A ModelOpt quantization configuration: ``quant_cfg``, an ordered list in which the last match wins, ``algorithm``."""

Bits: TypeAlias = int | str | tuple[int, ...]
"""Of an integer, exponent and mantissa of a float, or a word of a custom backend."""

BlockSizes: TypeAlias = dict[int | str, int | str | bool | tuple[int, ...] | None]
"""Dimension → block length (``None`` = the whole dimension), and words: ``type``, ``scale_bits``, …"""


class Cfg(TypedDict, total=False):
    """Attributes of a quantizer, those that are said; ModelOpt's ``QuantizerAttributeConfig`` has all of them."""

    num_bits: Bits
    axis: int | tuple[int, ...] | None
    block_sizes: BlockSizes | None
    type: str
    enable: bool
    backend: str
    backend_extra_args: dict[str, object] | None
    effective_bits: float
    use_constant_amax: bool


Setting: TypeAlias = Cfg | list[Cfg] | None
"""What a quantizer gets: its attributes, a list where it has stages, ``None`` = disabled."""


@dataclass(frozen=True)
class Entry:
    """An entry of ``quant_cfg`` that can match a linear: those for other module classes are not read.

    Attributes:
        pattern: Its ``quantizer_name``.
        enable: Whether it switches on.
        cfg: The quantizer's settings, a list where it has stages; ``None`` = it only switches.
        scopes: Quantizer → which linears it matches there, ``""`` = every one, else the pattern's module part; a
            quantizer that it cannot match is left out.
        index: Its place in ``quant_cfg``.
    """

    pattern: str
    enable: bool
    cfg: Cfg | list[Cfg] | None
    scopes: Mapping[str, str]
    index: int


@dataclass(frozen=True)
class LinearConfig:
    """What every linear that a configuration covers gets.

    Attributes:
        entries: In order; a later one wins.
        cfgs: Quantizer → its settings, a list where it has stages, ``None`` = disabled.
    """

    entries: tuple[Entry, ...]
    cfgs: Mapping[str, Setting]

    def stages(self) -> Iterator[tuple[str, Cfg]]:
        """Every enabled quantizer with its settings, the stages of a sequential one by one."""
        for quantizer in self.cfgs:
            for stage in self.stages_of(quantizer):
                yield quantizer, stage

    def stages_of(self, quantizer: str) -> list[Cfg]:
        """Settings of one quantizer, a list element per stage; empty where it is disabled."""
        cfg = self.cfgs[quantizer]
        return [] if cfg is None else cfg if isinstance(cfg, list) else [cfg]

    def covers(self, module_name: str, lm_head: bool = False, kind: str = "") -> bool:
        """Whether ``mtq.quantize`` with this configuration would quantize the weight of that linear.

        ModelOpt's presets leave out short convolutions and routers, by the names that some families give them. Under
        another name, they are left out where they would be under such a name. They leave out vision towers too; a
        linear of one is asked for only where it is wanted (``model.vision``).

        Args:
            module_name: Full name in the model.
            lm_head: Disregard the exclusion of the output head.
            kind: What it is (:data:`layerbits.results.result.KINDS`), where that is known.
        """
        if kind in _LEFT_OUT and not self.covers(f"{module_name.rpartition('.')[0]}.{_LEFT_OUT[kind]}", lm_head):
            return False
        name, enabled = f"{module_name}.{WEIGHT}", True
        asked = (("lm_head",) if lm_head else ()) + (_TOWERS if kind in VISION_KINDS else ())
        for entry in self.entries:
            if not entry.enable and any(part in entry.pattern for part in asked):
                continue
            if fnmatch.fnmatch(name, entry.pattern):
                enabled = entry.enable
        return enabled


def read_config(config: JsonMapping) -> LinearConfig:
    """Reads a configuration in the form of :func:`layerbits.candidates.formats.normalise`, or in JSON's types.

    A linear is described by which of the module patterns it matches; every combination that leaves its weight
    quantizer enabled has to come to the same setting.

    Raises:
        UserError: No weight is quantized, or linears differ.
    """
    entries = tuple(
        Entry(
            entry["quantizer_name"],
            entry.get("enable", True),
            entry.get("cfg"),
            {q: scope for q in QUANTIZERS if (scope := _scope(entry["quantizer_name"], q)) is not None},
            index,
        )
        for index, entry in enumerate(config["quant_cfg"])
        if entry.get("parent_class") in (None, "nn.Linear")
    )
    return LinearConfig(entries, _settled(entries))


def _settled(entries: tuple[Entry, ...]) -> dict[str, Setting]:
    last_on = max((i for i, e in enumerate(entries) if e.enable and WEIGHT in e.scopes), default=-1)
    scopes: dict[str, None] = {}
    for i, entry in enumerate(entries):
        if not (i > last_on and not entry.enable and WEIGHT in entry.scopes):  # else it only excludes modules
            scopes.update(dict.fromkeys(filter(None, entry.scopes.values())))
    if len(scopes) > 10:
        raise UserError(
            f"it tells {len(scopes)} module patterns apart, 10 at most can be checked; make several formats of it"
        )
    outcomes: list[dict[str, Setting]] = []
    for choice in itertools.product((False, True), repeat=len(scopes)):
        matched = {s for s, on in zip(scopes, choice, strict=True) if on}
        outcome = {q: _outcome(entries, q, matched) for q in QUANTIZERS}
        if outcome[WEIGHT] is not None and outcome not in outcomes:
            outcomes.append(outcome)
    if not outcomes:
        raise UserError("it quantizes no weights; enable *weight_quantizer")
    if len(outcomes) > 1:
        raise UserError(
            f"it sets linears differently by {', '.join(scopes)}, a candidate has one setting; make a format of each"
        )
    return outcomes[0]


def block_lengths(cfg: Cfg) -> dict[int, int | None]:
    """Dimension → block length; ``None`` = the whole dimension (per channel or token, spelled as blocks)."""
    sizes = cfg.get("block_sizes") or {}
    return cast("dict[int, int | None]", {k: v for k, v in sizes.items() if isinstance(k, int)})


def is_mx(cfg: Cfg) -> bool:
    """Whether it is a microscaling format: E8M0 block scales computed on the fly, nothing to calibrate."""
    blocks = cfg.get("block_sizes") or {}
    return blocks.get("type") == "dynamic" and blocks.get("scale_bits") == E8M0


def check_dimensions(quantizer: str, axes: int | Iterable[int], what: str) -> None:
    """Checks axes against the rank of what the quantizer sees; ModelOpt takes others for "per tensor" silently.

    Raises:
        UserError: Out of range, or every dimension at once.
    """
    rank = RANK[quantizer]
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -rank <= axis < rank:
            raise UserError(f"*{quantizer}: {what} {axis} is out of range for a Linear; use {-rank} to {rank - 1}")
    if what == "axis" and len({a % rank for a in axes}) == rank:
        raise UserError(f"*{quantizer}: axis {list(axes)} is one scale per value, which quantizes nothing; name fewer")


@functools.lru_cache
def _scope(pattern: str, quantizer: str) -> str | None:
    """Which linears a pattern matches for that quantizer: ``""`` = every one, ``None`` = none, else its module part."""
    tail = re.split(r"[*?\]]", pattern)[-1]
    if tail.endswith(quantizer):
        module = pattern[: -len(quantizer)]
    elif quantizer.endswith(tail):
        module = pattern[: len(pattern) - len(tail)]
    else:
        return None
    return module.rstrip(".*") if module else None


def _outcome(entries: tuple[Entry, ...], quantizer: str, matched: set[str]) -> Setting:
    """The cfg that a linear which matches those module patterns ends with; ``None`` = disabled."""
    enabled = True
    cfg: Setting = None
    for entry in entries:
        scope = entry.scopes.get(quantizer)
        if scope == "" or scope in matched:
            enabled = entry.enable
            cfg = cfg if entry.cfg is None else entry.cfg
    if enabled and cfg is None:
        raise UserError(
            f"it leaves {quantizer} at ModelOpt's default; start it with '*' disabled, then enable what it quantizes"
        )
    return cfg if enabled else None
