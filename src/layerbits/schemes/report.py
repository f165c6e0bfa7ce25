"""Schemes side by side, as plain rows and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.plain import JsonObject
from layerbits.schemes.additivity import Factor, expected
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import Source
from layerbits.schemes.sureness import Sureness
from layerbits.schemes.sureness import markdown as sure_words


def rows(schemes: Sequence[Scheme]) -> list[JsonObject]:
    """One plain record per scheme.

    Returns:
        Records with scheme, control, bits, bits_active, bits_modelopt, score, predicted_kl, kv_cache, kv_predicted_kl,
        groups, quantized_groups, candidates, digest and same_as (the first scheme with the same digest, where there is
        one).
    """
    first: dict[str, str] = {}
    records = []
    for scheme in schemes:
        same = first.setdefault(scheme.digest, scheme.name)
        records.append(
            {
                "scheme": scheme.name,
                "control": scheme.is_control,
                "bits": scheme.effective_bits,
                "bits_active": scheme.effective_bits_active if math.isfinite(scheme.effective_bits_active) else None,
                "bits_modelopt": scheme.effective_bits_modelopt,
                "score": scheme.score,
                "predicted_kl": scheme.predicted_kl if math.isfinite(scheme.predicted_kl) else None,
                "kv_cache": scheme.kv_cache,
                "kv_predicted_kl": scheme.kv_predicted_kl if math.isfinite(scheme.kv_predicted_kl) else None,
                "groups": len(scheme.groups),
                "quantized_groups": scheme.assignment.quantized,
                "candidates": [c.name for c in scheme.candidates],
                **scheme.size,
                "digest": scheme.digest,
                "same_as": same if same != scheme.name else None,
            }
        )
    return records


def markdown(schemes: Sequence[Scheme], sure: Sequence[Sureness] = (), known: Sequence[Factor] = ()) -> str:
    """A table of the schemes, below it what each should be read with, and how sure they are.

    Args:
        schemes: The schemes.
        sure: How sure they are.
        known: Factors by measured schemes: what is expected of each scheme stands beside its sum.
    """
    records = rows(schemes)
    # Where no group is routed experts, both units are one.
    active = any(row["bits_active"] not in (None, row["bits"]) for row in records)
    more = " bits of active weights |" if active else ""
    caches = any(row["kv_cache"] != NO_CACHE for row in records)
    beside, sized, timed = bool(known), *(any(key in scheme.size for scheme in schemes) for key in ("gib", "ms"))
    lines = [
        f"| scheme | bits |{more} ModelOpt's bits | quantized groups | raw score | predicted KL (nats/token) |"
        f"{' expected by measured schemes |' * beside}{' KV cache | its predicted KL |' * caches}"
        f"{' GiB | of that KV cache |' * sized}{' ms a step | unquantized |' * timed} digest |",
        f"|---|---|{'---|' * active}---|---|---|---|{'---|' * beside}{'---|---|' * (caches + sized + timed)}---|",
    ]
    for scheme, row in zip(schemes, records, strict=True):
        units = f" {_number(row['bits_active'], '.3f')} |" if active else ""
        same = f" (= {row['same_as']})" if row["same_as"] else ""
        cache = f" {row['kv_cache']} | {_number(row['kv_predicted_kl'], '.4g')} |" if caches else ""
        size = f" {_number(row.get('gib'), '.4g')} | {_number(row.get('kv_cache_gib'), '.4g')} |" if sized else ""
        size += f" {_number(row.get('ms'), '.4g')} | {_number(row.get('unquantized_ms'), '.4g')} |" if timed else ""
        lines.append(
            f"| {row['scheme']} | {row['bits']:.3f} |{units} {_number(row['bits_modelopt'], '.3f')} | "
            f"{row['quantized_groups']} of {row['groups']} | {row['score']:.4g} | "
            f"{_number(row['predicted_kl'], '.4g')} |{_expected(scheme, known)}{cache}{size} {row['digest']}{same} |"
        )
    lines += ["", *(f"Measured: {factor.words}" for factor in known)] if known else []
    notes = [f"- {scheme.name}: {note}" for scheme in schemes for note in scheme.notes]
    sure_table = sure_words(sure)
    return "\n".join([*lines, *(["", *notes] if notes else []), *(["", sure_table] if sure_table else [])]) + "\n"


def _expected(scheme: Scheme, known: Sequence[Factor]) -> str:
    if not known:
        return ""
    kl = expected(scheme, known)
    return " – |" if kl is None else f" {kl[0]:.4g} ± {kl[1]:.2g} |"


def metrics(schemes: Sequence[Scheme], sure: Sequence[Sureness] = (), known: Sequence[Factor] = ()) -> dict[str, float]:
    """Numbers for the tracking server: ``scheme/<name>/<number>``, finite ones only."""
    names = ("bits", "bits_active", "bits_modelopt", "score", "predicted_kl", "quantized_groups")
    records = rows(schemes)
    values = {f"scheme/{row['scheme']}/{name}": row[name] for row in records for name in names}
    cached = [row for row in records if row["kv_cache"] != NO_CACHE]
    values |= {f"scheme/{row['scheme']}/kv_predicted_kl": row["kv_predicted_kl"] for row in cached}
    sizes = ("gib", "weights_gib", "kv_cache_gib", "ms", "linears_ms", "unquantized_ms")
    values |= {f"scheme/{s.name}/{name}": s.size[name] for s in schemes for name in sizes if name in s.size}
    for scheme in schemes:
        if (kl := expected(scheme, known)) is not None:
            values[f"scheme/{scheme.name}/expected_kl"], values[f"scheme/{scheme.name}/expected_kl_se"] = kl
    values |= {f"scheme/{one.scheme}/{name}": value for one in sure for name, value in one.metrics().items()}
    return {key: float(value) for key, value in values.items() if value is not None}


def parameters(specs: Sequence[SchemeSpec], source: Source) -> dict[str, str]:
    """What was in force, for the tracking server; several values of one parameter are separated by commas."""
    chosen = [spec for spec in specs if spec.control is None]
    partial = [spec for spec in chosen if spec.coverage is not None and spec.coverage < 1]
    data = source.calibration
    lists = {
        "eff.schemes": [spec.name for spec in specs],
        "eff.candidates": [c.name for c in source.candidates],
        "eff.objective": [spec.objective for spec in chosen],
        "eff.coverage_order": [spec.coverage_order for spec in partial],
    }
    values = {key: ",".join(dict.fromkeys(names)) for key, names in lists.items()}
    values |= {"eff.model": source.model.name, "eff.model_revision": source.model.revision, "eff.method": source.method}
    values |= {"eff.cost_model": source.cost_model, "eff.kv_cache": source.kv_cache}
    values |= {"eff.dataset": data.dataset, "eff.dataset_size": data.size}
    values |= {f"eff.{key}": value for key, value in source.timed_on.items()}
    return {key: value for key, value in values.items() if value}


def exclude_patterns(scheme: Scheme) -> list[str]:
    """The exclude list with a wildcard for each block that stays unquantized as a whole, as ModelOpt and vLLM read it.

    Returns:
        Names and patterns (``fnmatch``), in model order: of the scheme's linears they match those of
        :attr:`Scheme.exclude` and no other.
    """
    quantized = {g.block for g, name in zip(scheme.groups, scheme.assignment, strict=True) if name is not None}
    patterns: dict[str, None] = {}
    for group, name in zip(scheme.groups, scheme.assignment, strict=True):
        if name is not None:
            continue
        if group.block is None or group.block in quantized:
            patterns.update(dict.fromkeys(group.modules))
            continue
        for module in group.modules:
            parts = module.split(".")
            patterns[".".join(parts[: parts.index(str(group.block)) + 1]) + ".*"] = None
    return list(patterns)


def excludes(schemes: Sequence[Scheme]) -> str:
    """The exclude lists to paste, a JSON list per scheme; those of the controls are left to their files."""
    lines = [f"{scheme.name}: {json.dumps(exclude_patterns(scheme))}" for scheme in schemes if not scheme.is_control]
    return "\n\n".join(["Exclude lists (every name in full: exclude/*.yaml)", *lines]) + "\n"


def exclude_yaml(scheme: Scheme) -> str:
    """The exclude list to paste: module names that stay unquantized, as YAML (and so a list in most configurations)."""
    head = f"# {scheme.name}: {len(scheme.exclude)} linears that stay unquantized, digest {scheme.digest}\n"
    return head + "".join(f"- {name}\n" for name in scheme.exclude)


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
