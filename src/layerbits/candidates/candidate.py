"""Candidates: one effective format (quant pair under a granularity overlay), with its content hash and its bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerbits.candidates.bits import modelopt_bits, precision, weight_bits
from layerbits.candidates.formats import (
    Format,
    QuantPair,
    algorithm_settings,
    normalise,
    plain,
    resolve_format,
    with_algorithm,
)
from layerbits.candidates.granularity import (
    TOKEN_GROUP_BACKEND,
    Overlay,
    apply_overlay,
    register_backend,
    with_token_groups,
)
from layerbits.candidates.linear import INPUT, WEIGHT, Config
from layerbits.errors import UserError
from layerbits.plain import JsonMapping, JsonObject
from layerbits.results.result import CandidateInfo

UNQUANTIZED_BITS = 16.0


@dataclass(frozen=True)
class Candidate:
    """One effective format.

    Attributes:
        info: Plain data for the manifest; ``info.config`` is ``format.config`` in JSON's types.
        format: With the overlay applied.
    """

    info: CandidateInfo
    format: Format

    def search_config(self) -> Config:
        """What ``mtq.auto_quantize`` gets: entries without module names, and the storage bits as the cost.

        Registers our backend with ModelOpt if the configuration names it.
        """
        bare = self.format.bare()
        if TOKEN_GROUP_BACKEND in json.dumps(plain(bare)):
            register_backend()
        return {**bare, "effective_bits": self.info.bits}


def resolve_candidate(pair: QuantPair, overlay: Overlay, fp4: str = "mxfp4", experimental: bool = False) -> Candidate:
    """Lays an overlay over a pair's format.

    Args:
        pair: The quant pair.
        overlay: The granularity.
        fp4: What FP4 means, ``mxfp4`` or ``nvfp4``.
        experimental: Whether experimental pairs may be used.

    Raises:
        UserError: The pair is experimental, its format is not known or refused, it is not what the pair says, or the
            overlay does not fit it.
    """
    if pair.experimental and not experimental:
        why = f" ({pair.note})" if pair.note else ""
        raise UserError(f"quant pair {pair.name} is experimental{why}; set experimental=true to use it")
    base = resolve_format(pair.format, fp4)
    format = with_algorithm(replace(base, config=normalise(with_token_groups(apply_overlay(base, overlay)))))
    linear = format.linear
    for what, said, actual in (
        ("weight", pair.weight, precision(linear.cfgs[WEIGHT])),
        ("activation", pair.activation, precision(linear.cfgs[INPUT])),
    ):
        if said != actual:
            raise UserError(
                f"quant pair {pair.name} says {what}: {said}, but format {base.name} is {actual}; correct one"
            )
    info = CandidateInfo(
        name=pair.name if overlay.name == "default" else f"{pair.name}/{overlay.name}",
        quant_pair=pair.name,
        granularity=overlay.name,
        format_name=base.name,
        weight_precision=pair.weight,
        activation_precision=pair.activation,
        config=plain(format.config),
        config_hash=config_hash(format.config),
        bits=weight_bits(linear),
        bits_modelopt=modelopt_bits(linear),
        adjustments=format.adjustments,
    )
    return Candidate(info, format)


def config_hash(config: JsonMapping) -> str:
    """Content hash of a configuration: 16 hex digits of SHA-256, the same on every machine.

    The order of keys, the spelling (list or legacy dict, tuple or list, ``-1`` or ``"-1"``, ModelOpt's default or
    absent) and entries that a later one overrides do not count; nor does ``effective_bits``, which is a cost and not
    numerics.

    Raises:
        UserError: ModelOpt refuses the configuration.
    """
    from modelopt.torch.quantization.config import QuantizeConfig

    normal = normalise(config)
    dumped = QuantizeConfig(quant_cfg=normal["quant_cfg"]).model_dump(exclude_defaults=True)["quant_cfg"]
    entries = [_canonical_entry(e) for e in dumped]
    content = plain({"quant_cfg": live_entries(entries), "algorithm": algorithm_settings(normal["algorithm"])})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def live_entries(entries: Sequence[JsonObject]) -> list[JsonObject]:
    """The entries of a ``quant_cfg`` list without those of which a later one leaves nothing."""
    return [e for i, e in enumerate(entries) if not any(_overrides(later, e) for later in entries[i + 1 :])]


def check_target(
    candidates: Candidate | Sequence[Candidate], target: float, vision_target: float | None = None
) -> None:
    """Checks budgets of effective bits against what the candidates can reach.

    Args:
        candidates: What groups may be quantized with.
        target: Bits per weight.
        vision_target: The same of a vision tower with a budget of its own.

    Raises:
        UserError: Below the storage bits of the smallest candidate, or above 16.
    """
    candidates = [candidates] if isinstance(candidates, Candidate) else candidates
    smallest = min((c.info for c in candidates), key=lambda info: info.bits)
    for key, bits in (("effective_bits", target), ("vision_bits", vision_target)):
        if bits is not None and not smallest.bits <= bits <= UNQUANTIZED_BITS:
            raise UserError(
                f"{key}={bits:g} cannot be reached: the floor of {smallest.name} is {smallest.bits:g} "
                f"(all linears quantized) and {UNQUANTIZED_BITS:g} is none; choose a number between"
            )


def _canonical_entry(entry: JsonObject) -> JsonObject:
    cfg = entry.get("cfg")
    if cfg is None:
        return entry
    stages = [_canonical_cfg(stage) for stage in (cfg if isinstance(cfg, list) else [cfg])]
    return {**entry, "cfg": stages if isinstance(cfg, list) else stages[0]}


def _canonical_cfg(cfg: JsonObject) -> JsonObject:
    kept = {k: v for k, v in cfg.items() if k != "effective_bits"}
    if kept.get("block_sizes"):
        kept["block_sizes"] = {
            k: v
            for k, v in kept["block_sizes"].items()
            if isinstance(k, int) or (v is not None and (k, v) != ("type", "static"))
        }
    return kept


def _overrides(later: JsonObject, earlier: JsonObject) -> bool:
    """Whether nothing of an entry is left after a later one.

    An entry with ``cfg`` replaces everything (but the range that ``constant_amax`` has stored); one without only
    switches on or off, and switching off also ends a rotation.
    """
    if "parent_class" in later and later["parent_class"] != earlier.get("parent_class"):
        return False
    pattern, inner = later["quantizer_name"], earlier["quantizer_name"]
    suffix = pattern.removeprefix("*")
    literal = pattern.startswith("*") and not set(suffix) & set("*?[]")
    if pattern != inner and not (literal and inner.endswith(suffix)):
        return False
    if "cfg" in later:
        return "constant_amax" not in json.dumps(plain(earlier))
    return "cfg" not in earlier and (later.get("enable", True) is False or earlier.get("enable", True))
