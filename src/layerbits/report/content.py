"""What a report tells, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from layerbits.plain import JsonObject, finite
from layerbits.report.wording import config_words, stability_words
from layerbits.results.assignment import UNQUANTIZED_BITS
from layerbits.results.frames import groups_for_share, listed
from layerbits.results.modality import Modality
from layerbits.results.result import FloatArray, NonFinite, SensitivityResult, bits_apart, by_kind
from layerbits.results.routing import FLOOR, coverage, coverage_words

SCHEMA_VERSION = 1
MOST = 0.9
"""The share of the damage whose number of groups is said."""
_NAMED = 20


def json_report(result: SensitivityResult) -> JsonObject:
    """Everything that the Markdown report tells, as JSON data (numbers that are not finite become ``None``).

    Where the choice of the recipe is not known, its counts are ``None`` and layers have no ``chosen``. Without
    intervals, ``intervals`` is ``None`` and layers have no ``low``, ``high``, ``rank_low``, ``rank_high`` and ``tied``.
    """
    allocation, cal = result.allocation, result.calibration
    assignment = allocation.assignment
    kept = [g for g, name in zip(result.groups, assignment, strict=True) if name is None] if assignment else None
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": result.run_name,
        "created": result.created,
        "attention": list(_attention(result)),
        "baseline": _baseline(result),
        "model": asdict(result.model),
        "calibration": {
            **asdict(cal),
            "batch_loss_tokens": list(cal.batch_loss_tokens),
            "padding_share": finite(cal.padding_share),
        },
        "method": result.method,
        "engine": result.engine,
        "seed": result.seed,
        "device": result.device,
        "recipe": {
            "target_bits": finite(allocation.target_bits),
            "effective_bits": finite(allocation.effective_bits),
            "effective_bits_modelopt": finite(allocation.effective_bits_modelopt),
            "effective_bits_active": finite(allocation.effective_bits_active),
            "cost_model": allocation.cost_model,
            **_tower(result),
            "score": finite(allocation.score),
            "groups": len(result.groups),
            "quantized_groups": None if kept is None else len(result.groups) - len(kept),
            "unquantized_modules": None if kept is None else [m for g in kept for m in g.modules],
        },
        "experts": {
            "floor": FLOOR,
            "phases": [{**asdict(c), "words": coverage_words(c)} for c in coverage(result.routing)],
        },
        "intervals": _intervals(result),
        **({"modality": _modality(result, result.modality)} if result.modality else {}),
        "candidates": [_candidate(result)],
        "nonfinite": [asdict(n) for n in result.nonfinite],
        "seconds": dict(result.seconds),
        "memory": dict(result.memory),
        "tags": dict(result.tags),
        "provenance": dict(result.provenance),
    }


def _tower(result: SensitivityResult) -> JsonObject:
    """The vision tower's own budget, and effective bits of the tower and of all else; empty where they share one."""
    allocation = result.allocation
    if allocation.vision_bits is None:
        return {}
    found: JsonObject = {"vision_bits": allocation.vision_bits}
    if allocation.assignment:
        bits = [UNQUANTIZED_BITS if name is None else result.candidate.bits for name in allocation.assignment]
        rest, tower = bits_apart(result.groups, bits, allocation.cost_model)
        found |= {"vision_effective_bits": tower, "other_effective_bits": rest}
    return found


def _baseline(result: SensitivityResult) -> JsonObject | None:
    """Loss of the unquantized model and of guessing, nats per token."""
    baseline = result.baseline
    if baseline is None:
        return None
    loss, guessing = finite(baseline.loss_per_token), baseline.guessing
    return {"loss_per_token": loss, "vocabulary": baseline.vocabulary, "guessing": guessing}


def _intervals(result: SensitivityResult) -> JsonObject | None:
    """What the manifest says of them, with how stable the top of the ranking is, in words."""
    ends, name = result.intervals, result.candidate.name
    if ends is None:
        return None
    words = stability_words(ends.top, ends.captions, ends.top_overlap, ends.top_captions)
    return {**ends.to_json(name), "words": {name: words}}


def _modality(result: SensitivityResult, modality: Modality) -> dict[str, object]:
    """What comes from pictures."""
    return {
        "image_tokens": modality.image_tokens,
        "tokens": modality.tokens,
        "share": finite(modality.whole(result.predicted_kl)),
        "clipped": finite(modality.clipped),
        "ranges": [asdict(r) for r in modality.ranges],
    }


def _candidate(result: SensitivityResult) -> JsonObject:
    info, scores, kl = result.candidate, result.scores, result.predicted_kl
    total, assignment, shares = result.total("scores"), result.allocation.assignment, result.shares()
    position = {g.key: i for i, g in enumerate(result.groups)}
    layers = []
    for row in result.rows():
        layer = {
            "rank": row["rank"],
            "layer": row["layer"],
            "block": row["block"],
            "kind": row["kind"],
            "modules": row["modules"],
            "weights": row["weights"],
            "predicted_kl": finite(row["predicted_kl"]),
            "score": finite(row["score"]),
            "share": finite(row["score"] / total) if total > 0 else None,
        }
        if result.baseline is not None:
            layer["believable"] = row["believable"]
        if row.get("measured_se") is not None:
            layer["measured_se"] = row["measured_se"]
        if assignment:
            layer["chosen"] = assignment[position[row["layer"]]]
        if result.intervals is not None:
            layer |= {"low": finite(row["low"]), "high": finite(row["high"])}
            layer |= {name: row[name] for name in ("rank_low", "rank_high", "tied")}
        if result.modality is not None:
            layer |= {name: finite(row[name]) for name in ("image_share", "image_low", "image_high")}
        layers.append(layer)
    kinds = [
        {
            "kind": kind,
            "groups": len(at),
            "weights": sum(result.groups[i].weights for i in at),
            "predicted_kl": _sum(kl[at]),
            "score": _sum(scores[at]),
            "share": shares[kind] if total > 0 else None,
            "quantized": sum(assignment[i] == info.name for i in at) if assignment else None,
        }
        for kind, at in by_kind(result.groups)
    ]
    return {
        "name": info.name,
        "quant_pair": info.quant_pair,
        "granularity": info.granularity,
        "format_name": info.format_name,
        "words": config_words(info.config),
        "config_hash": info.config_hash,
        "adjustments": list(info.adjustments),
        "bits": finite(info.bits),
        "bits_modelopt": finite(info.bits_modelopt),
        "predicted_kl_sum": _sum(kl),
        "score_sum": _sum(scores),
        "nonfinite": int((~np.isfinite(scores)).sum()),
        "not_believable": int(result.beyond.sum()),
        "groups_for_most": groups_for_share(scores, MOST) or None,
        "kinds": kinds,
        "layers": layers,
    }


def _attention(result: SensitivityResult) -> Iterator[str]:
    """What a reader must know before any number, a sentence each."""
    name, kl = result.candidate.name, result.predicted_kl
    known = np.isfinite(kl).any()
    why = {n.group: n.detail for n in reversed(result.nonfinite)}
    bad = [g.key for g, score in zip(result.groups, result.scores, strict=True) if not math.isfinite(score)]
    if bad:
        names = listed([f"{key} ({why[key]})" if why.get(key) else key for key in bad], _NAMED)
        yield (
            f"{name}: the score of {len(bad)} of {len(result.groups)} groups is not finite: {names}. They "
            "rank last, and totals and shares leave them out."
        )
    parts = [_entry(n) for n in result.nonfinite if n.group not in bad]
    if parts:
        yield f"{name}: not finite within groups that have a score: {listed(parts, _NAMED)}."
    half = np.isfinite(result.scores) & ~np.isfinite(kl)
    if known and half.any():
        names = listed([result.groups[i].key for i in np.flatnonzero(half)], _NAMED)
        yield f"{name}: the predicted KL of {names} is not finite and missing in its sum."
    if (far := np.flatnonzero(result.beyond)).size and result.baseline is not None:
        worst = sorted(far.tolist(), key=lambda g: -kl[g])
        names = listed([f"{result.groups[g].key} {kl[g]:.3g}" for g in worst], _NAMED)
        yield (
            f"{name}: the predicted KL of {len(far)} of {len(result.groups)} groups is above "
            f"ln({result.baseline.vocabulary:,}) = {result.baseline.guessing:.2f} nats per token and not "
            f"believable: {names}. A prediction from small changes does not hold so far out: read these as very "
            "sensitive, and no number into them or into the total. Figures leave them out."
        )
    if not known and np.isfinite(result.scores).any():
        yield "The predicted KL is not known for this result: only raw scores are told."
    yield from result.warnings


def _entry(n: NonFinite) -> str:
    sample = f" sample {n.sample}" if n.sample is not None else ""
    return f"{n.group}{sample}{f' ({n.detail})' if n.detail else ''}"


def _sum(values: FloatArray) -> float | None:
    """Sum of the finite values; ``None`` where there is none, which is not the same as zero."""
    counted = values[np.isfinite(values)]
    return float(counted.sum()) if counted.size else None
