"""Whether a runtime serves an exported checkpoint as it was proven, and how much damage it does there.

A checkpoint that loads cleanly and answers with corrupted logits is a known failure. So the distributions that the
runtime tells are compared with those of PyTorch: of the unquantized model, of the scheme as it was scored, and of the
model made of the checkpoint alone. That its files are those that were proven, their digest says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.checkpoint.reader import Checkpoint, open_checkpoint
from layerbits.checkpoint.structure import Check, check_structure
from layerbits.errors import Skipped, UserError
from layerbits.plain import finite_object
from layerbits.schemes import Scheme
from layerbits.serving.distributions import Distributions, shared
from layerbits.serving.verdict import (
    DIVERGES,
    GAIN_BOUND,
    LOADS,
    SKIPPED,
    TIMED,
    UNKNOWN,
    Divergence,
    Measured,
    divergence,
    largest_gain,
)

if TYPE_CHECKING:
    from layerbits.results.result import FloatArray
    from layerbits.serving.reference import Reference
    from layerbits.serving.speed import Speeds
    from layerbits.serving.texts import Texts

MANIFEST = "layerbits.json"


@dataclass(frozen=True, eq=False)
class RuntimeOutput:
    """What a runtime computed of a model.

    Attributes:
        distributions: At the positions that count.
        texts: Greedy continuations of the first rows.
        runtime: What it was: package, version, plugin.
    """

    distributions: Distributions
    texts: tuple[str, ...]
    runtime: Mapping[str, str]


@dataclass(frozen=True)
class ServeCheck:
    """Everything that was checked of one checkpoint.

    Attributes:
        structure: What its files say of themselves.
        outcome: ``loads``, ``refused``, ``diverges``, ``skipped``, or ``timed`` where nothing was compared.
        detail: In words, or the runtime's own.
        measured: ``None`` where it was not served, or not compared.
        texts: Continuations.
        runtime: What served it.
        speeds: How fast, where that was asked.
        untimed: Why not, where it was asked and failed.
        unasked: What it was not asked, in words.
    """

    folder: Path
    digest: str
    structure: tuple[Check, ...]
    outcome: str
    detail: str
    measured: Measured | None = None
    texts: tuple[str, ...] = ()
    runtime: Mapping[str, str] = field(default_factory=dict)
    speeds: Speeds | None = None
    untimed: str = ""
    unasked: str = ""

    def require(self) -> None:
        """Raises unless everything was checked and is well.

        Raises:
            Skipped: The runtime is missing; what needs none has passed.
            UserError: The checkpoint is not sound, or not served as it was scored.
        """
        if failed := next((c for c in self.structure if not c.passed), None):
            raise UserError(f"{self.folder} is not sound: {failed.name} - not so: {failed.detail}; export it again")
        if self.outcome == SKIPPED:
            raise Skipped(f"{self.detail}; checked were the files alone, and they are sound")
        if self.outcome not in (LOADS, TIMED):
            on = " on" if self.outcome == DIVERGES else ""
            raise UserError(f"vLLM {self.outcome}{on} {self.folder}: {self.detail}")
        if self.untimed:
            raise UserError(f"{self.folder} loads, and was not timed: {self.untimed}")

    @property
    def sentence(self) -> str:
        """The verdict in words, with what it says nothing of."""
        return f"{self.detail}; {self.unasked}" if self.unasked else self.detail

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers for the tracking server."""
        values = {"serve/structure_failed": float(sum(not c.passed for c in self.structure))}
        values |= self.measured.metrics() if self.measured else {}
        return values | (self.speeds.metrics() if self.speeds else {})

    def to_json(self) -> dict[str, object]:
        """Plain JSON data; what is not a number becomes null."""
        data = {**asdict(self), "folder": str(self.folder)}
        if self.measured is not None:
            data["measured"] |= {"explained": self.measured.explained, "ratio": self.measured.ratio}
            data["measured"]["gain"]["allowed"] = self.measured.gain.allowed
        return finite_object(data)

    def markdown(self) -> str:
        """The report to read, the verdict first: a page of MLflow shows its first lines."""
        by = f" ({', '.join(f'{key} {value}' for key, value in self.runtime.items())})" if self.runtime else ""
        lines = [f"# Serve check of {self.folder.name}", "", f"**{self.outcome}**{by}: {self.sentence}"]
        if self.measured is not None:
            lines += ["", *_table(self.measured)]
        if self.speeds is not None:
            lines += ["", *self.speeds.markdown()]
        if self.untimed:
            lines += ["", f"Speed and memory were not measured: {self.untimed}"]
        if self.texts:
            lines += ["", *(f"- `{text!r}`" for text in self.texts)]
        lines += ["", "## Files", ""]
        lines += [
            f"- {'ok' if c.passed else 'NOT'}: {c.name}{'' if c.passed else f' - {c.detail}'}" for c in self.structure
        ]
        return "\n".join(lines) + "\n"


def _table(m: Measured) -> list[str]:
    covered = (
        "all tokens" if m.top_k < 0 else f"the {m.top_k} most likely tokens ({m.mass:.1%} of the mass) and the rest"
    )
    rows = [
        ("**damage as served**: served scheme from the served unquantized model", m.served_damage),
        ("damage in PyTorch: restored checkpoint from the unquantized model", m.restored_damage),
        ("the same, both rounded to the runtime's dtype, in PyTorch", m.rounded_damage),
        ("damage in PyTorch: scheme as scored from the unquantized model", m.scored_damage),
        ("the same over the whole vocabulary", m.scored_damage_whole),
        ("noise: served unquantized model from PyTorch's", m.noise),
        ("served scheme from the restored checkpoint", m.from_restored),
        ("served scheme from the restored checkpoint with its activations in 16 bits", m.from_weights),
        ("served scheme from the scheme as scored", m.from_scored),
        ("rounding: restored checkpoint in the runtime's dtype from float32, in PyTorch", m.rounding),
        ("files: restored checkpoint from the scheme as scored, in PyTorch", m.files),
    ]
    gain = m.gain
    return [
        f"{m.tokens:,} held-out tokens; over {covered}; perplexity as served {m.perplexity:.3f}.",
        "",
        "| KL divergence, nats per token | mean ± SE over captions |",
        "|---|---|",
        *(f"| {what} | {value if math.isfinite(value.kl) else '–'} |" for what, value in rows),
        "",
        f"Of {gain.linears} linears, the output of `{gain.linear}` is off most surely: by about {gain.off:+.1%}. "
        f"Of what is beyond {GAIN_BOUND:.0%}, t is {gain.t:.2f} over {gain.captions} captions; {gain.allowed:.2f} is "
        "allowed.",
    ]


def check_files(folder: Path) -> tuple[Checkpoint, str, tuple[Check, ...]]:
    """Opens a checkpoint and checks what its files say of themselves.

    Returns:
        The checkpoint, the digest of its tensors, and the checks; the last is whether they are those that were proven.

    Raises:
        UserError: The folder is no checkpoint that can be read.
    """
    checkpoint = open_checkpoint(folder)
    digest = checkpoint.digest()
    try:
        proven = json.loads((folder / MANIFEST).read_text("utf-8"))["record"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return checkpoint, digest, check_structure(checkpoint)
    same = Check("its tensors are those that were proven", digest == proven, f"digest {digest[:12]}, not {proven[:12]}")
    return checkpoint, digest, (*check_structure(checkpoint), same)


def read_scheme(folder: Path) -> Scheme:
    """The scheme that a checkpoint was made from, as its ``layerbits.json`` has it.

    Raises:
        UserError: It has none.
    """
    try:
        return Scheme.from_json(json.loads((folder / MANIFEST).read_text("utf-8"))["scheme"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} has no {MANIFEST} that can be read, so what it was made from is not known; give an export of "
            "`-e export`"
        ) from None


def compare(
    pytorch: Reference, unquantized: RuntimeOutput | None, served: RuntimeOutput, texts: Texts, top_k: int
) -> Measured:
    """All divergences between the models.

    Args:
        pytorch: PyTorch's models on the texts.
        unquantized: The runtime's unquantized model on them, where it was served.
        served: The runtime's scheme on them.
        texts: Which captions the tokens belong to.
        top_k: As the runtime was asked.
    """
    both = [served.distributions] if unquantized is None else [served.distributions, unquantized.distributions]
    events = shared(*both)
    p = {name: getattr(pytorch, name).at(events) for name in ("scored", "rounded", "restored", "expected")}
    p["unquantized"], p["rounded_unquantized"] = (
        w.at(events) for w in (pytorch.plain.unquantized, pytorch.plain.rounded)
    )
    runtime = served.distributions.at(events.events)
    plain = None if unquantized is None else unquantized.distributions.at(events.events)

    def between(ours: FloatArray | None, theirs: FloatArray | None) -> Divergence:
        if ours is None or theirs is None:
            return UNKNOWN
        return divergence(events.kl(ours, theirs), texts.caption)

    gains = pytorch.gain_scores(events, np.exp(runtime) - np.exp(p["expected"]))
    return Measured(
        tokens=texts.tokens,
        top_k=top_k,
        mass=events.mass(p["unquantized"]),
        served_damage=between(plain, runtime),
        restored_damage=between(p["unquantized"], p["restored"]),
        rounded_damage=between(p["rounded_unquantized"], p["rounded"]),
        scored_damage=between(p["unquantized"], p["scored"]),
        scored_damage_whole=divergence(pytorch.plain.unquantized.kl(pytorch.scored), texts.caption),
        noise=between(p["unquantized"], plain),
        rounding_noise=between(p["unquantized"], p["rounded_unquantized"]),
        from_restored=between(p["restored"], runtime),
        from_scored=between(p["scored"], runtime),
        rounding=between(p["restored"], p["rounded"]),
        files=between(p["scored"], p["restored"]),
        gain=largest_gain(gains.linears, gains.scores, gains.information),
        perplexity=math.exp(-float(np.mean(served.distributions.own))),
        from_weights=between(None if pytorch.weights is None else pytorch.weights.at(events), runtime),
    )


def judge(
    folder: Path,
    digest: str,
    structure: tuple[Check, ...],
    served: RuntimeOutput,
    measure: Callable[[], Measured],
    known: str = "",
) -> ServeCheck:
    """The check of a checkpoint that the runtime has served.

    Args:
        folder: The checkpoint.
        digest: Of its tensors.
        structure: What its files say of themselves.
        served: What the runtime computed.
        measure: Compares it; called only where it is numbers.
        known: Why it may diverge on this machine, and what does not.
    """
    cause = f"; known: {known}" if known else ""
    if not served.distributions.finite:
        detail = f"it tells log-probabilities that are not numbers{cause}"
        return ServeCheck(folder, digest, structure, DIVERGES, detail, None, served.texts, served.runtime)
    measured = measure()
    outcome = DIVERGES if measured.diverges else LOADS
    detail = measured.sentence + (cause if measured.diverges else "")
    return ServeCheck(folder, digest, structure, outcome, detail, measured, served.texts, served.runtime)
