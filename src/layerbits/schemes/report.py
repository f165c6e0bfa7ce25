"""Schemes side by side, as plain rows and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layerbits.schemes.scheme import Scheme


def rows(schemes: Sequence[Scheme]) -> list[dict[str, Any]]:
    """One plain record per scheme.

    Returns:
        Records with scheme, control, bits, bits_modelopt, score, predicted_kl, groups, quantized_groups, candidates,
        digest and same_as (the first scheme with the same digest, where there is one).
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
                "bits_modelopt": scheme.effective_bits_modelopt,
                "score": scheme.score,
                "predicted_kl": scheme.predicted_kl if math.isfinite(scheme.predicted_kl) else None,
                "groups": len(scheme.groups),
                "quantized_groups": sum(name is not None for name in scheme.assignment),
                "candidates": [c.name for c in scheme.candidates],
                "digest": scheme.digest,
                "same_as": same if same != scheme.name else None,
            }
        )
    return records


def markdown(schemes: Sequence[Scheme]) -> str:
    """A table of the schemes, and below it what each should be read with."""
    lines = [
        "| scheme | bits | ModelOpt's bits | quantized groups | raw score | predicted KL (nats/token) | digest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows(schemes):
        same = f" (= {row['same_as']})" if row["same_as"] else ""
        lines.append(
            f"| {row['scheme']} | {row['bits']:.3f} | {_number(row['bits_modelopt'], '.3f')} | "
            f"{row['quantized_groups']} of {row['groups']} | {row['score']:.4g} | "
            f"{_number(row['predicted_kl'], '.4g')} | {row['digest']}{same} |"
        )
    notes = [f"- {scheme.name}: {note}" for scheme in schemes for note in scheme.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def metrics(schemes: Sequence[Scheme]) -> dict[str, float]:
    """Numbers for the tracking server: ``scheme/<name>/<number>``, finite ones only."""
    names = ("bits", "bits_modelopt", "score", "predicted_kl", "quantized_groups")
    values = {f"scheme/{row['scheme']}/{name}": row[name] for row in rows(schemes) for name in names}
    return {key: float(value) for key, value in values.items() if value is not None}


def exclude_yaml(scheme: Scheme) -> str:
    """The exclude list to paste: module names that stay unquantized, as YAML (and so a list in most configurations)."""
    head = f"# {scheme.name}: {len(scheme.exclude)} linears that stay unquantized, digest {scheme.digest}\n"
    return head + "".join(f"- {name}\n" for name in scheme.exclude)


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
