"""What a probe measured, as plain typed data (no torch)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerbits.errors import UserError
from layerbits.result import ModelInfo, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Difference:
    """A model against the unquantized one, over ``tokens`` positions.

    Attributes:
        perplexity: ``exp`` of the mean loss of the next token.
        kl: Mean KL divergence from the unquantized model's distribution, nats per token.
        kl_p99: 99th percentile of it over the tokens (linear between order statistics).
        top1_agreement: Share of the tokens with the same most likely next token.
        logit_mse: Mean squared difference over tokens and vocabulary.
        logit_max_error: Largest absolute difference.
        nonfinite: Tokens where a logit is not a number; they make the other figures NaN.
    """

    tokens: int
    perplexity: float
    kl: float
    kl_p99: float
    top1_agreement: float
    logit_mse: float
    logit_max_error: float
    nonfinite: int = 0


@dataclass(frozen=True)
class SchemeProbe:
    """One scheme's measured error beside what was predicted for it.

    Attributes:
        predicted_kl: Sum of the predicted KL over the quantized groups, nats per token; NaN where there is none.
    """

    scheme: str
    digest: str
    control: bool
    effective_bits: float
    predicted_kl: float
    difference: Difference
    seconds: float

    @property
    def additivity(self) -> float:
        """Measured over predicted KL: 1 where the damages of the groups simply add up."""
        return self.difference.kl / self.predicted_kl if self.predicted_kl > 0 else math.nan


@dataclass(frozen=True)
class Rows:
    """What was probed on: ``rows`` rows of held-out captions, ``tokens`` of them counted."""

    dataset: str
    packing: str
    seq_len: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class ProbeResult:
    """A probe of some schemes on one model.

    Attributes:
        reference_perplexity: Of the unquantized model.
        floor: The unquantized model against itself.
        floor_kind: How that was made, in words.
    """

    model: ModelInfo
    source_run_ids: tuple[str, ...]
    data: Rows
    reference_perplexity: float
    floor: Difference
    floor_kind: str
    schemes: tuple[SchemeProbe, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data with its schema version; what is not a number becomes null."""
        plain: dict[str, Any] = _finite({"schema_version": SCHEMA_VERSION, **asdict(self)})
        for record, probed in zip(plain["schemes"], self.schemes, strict=True):
            record["additivity"] = _finite(probed.additivity)
        return plain

    def records(self) -> list[dict[str, Any]]:
        """One flat record per scheme: scheme, control, bits, predicted_kl, the fields of the difference, additivity."""
        return [
            {
                "scheme": s.scheme,
                "digest": s.digest,
                "control": s.control,
                "bits": s.effective_bits,
                "predicted_kl": s.predicted_kl,
                **asdict(s.difference),
                "additivity": s.additivity,
                "seconds": s.seconds,
            }
            for s in self.schemes
        ]

    def metrics(self) -> dict[str, float]:
        """The finite numbers: ``probe/<scheme>/<number>``, the same for ``floor``, ``probe/unquantized/perplexity``."""
        names = ("perplexity", "kl", "kl_p99", "top1_agreement", "logit_mse", "logit_max_error")
        values = {"probe/unquantized/perplexity": self.reference_perplexity}
        for key in names:
            values[f"probe/floor/{key}"] = getattr(self.floor, key)
        for s in self.schemes:
            for key in names:
                values[f"probe/{s.scheme}/{key}"] = getattr(s.difference, key)
            values[f"probe/{s.scheme}/bits"] = s.effective_bits
            values[f"probe/{s.scheme}/predicted_kl"] = s.predicted_kl
            values[f"probe/{s.scheme}/additivity"] = s.additivity
            values[f"probe/{s.scheme}/nonfinite"] = float(s.difference.nonfinite)
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def markdown(self) -> str:
        """A table, a row per scheme, and the unquantized model and the noise floor below."""
        d = self.data
        lines = [
            f"{self.model.name} ({self.model.dtype}), {d.rows} held-out rows of {d.dataset} "
            f"({d.packing}, {d.seq_len} tokens), {d.tokens:,} tokens counted",
            "",
            "| scheme | bits | perplexity | KL (nats/token) | p99 KL | predicted KL | measured / predicted | "
            "top-1 agreement | logit MSE | max error |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {s.scheme} | {s.effective_bits:.3f} | {_words(s.difference)[0]} | {s.difference.kl:.4g} | "
                f"{s.difference.kl_p99:.4g} | {s.predicted_kl:.4g} | {s.additivity:.2f} | {_words(s.difference)[1]} |"
                for s in self.schemes
            ),
            f"| unquantized | 16 | {self.reference_perplexity:.4f} | | | | | | | |",
            f"| noise floor | 16 | {_words(self.floor)[0]} | {self.floor.kl:.4g} | {self.floor.kl_p99:.4g} | | | "
            f"{_words(self.floor)[1]} |",
            "",
            f"Noise floor: {self.floor_kind}.",
        ]
        below = [s.scheme for s in self.schemes if s.difference.kl <= self.floor.kl]
        lines += [f"Not above the noise floor: {', '.join(below)}."] if below else []
        bad = [f"{s.scheme} ({s.difference.nonfinite} tokens)" for s in self.schemes if s.difference.nonfinite]
        lines += [f"Logits that are not numbers: {', '.join(bad)}."] if bad else []
        return "\n".join(lines) + "\n"

    def write(self, root: Path) -> Path:
        """Writes ``probe.json``, ``probe.md`` and ``figures/probe.png`` into a folder of its own, whole or not at all.

        Args:
            root: Output root; the folder is made below its ``tmp``.

        Raises:
            UserError: The disk is full or cannot be written.
        """
        from layerbits.figures.style import save_png

        final = root / "tmp" / f"probe_{self.model.name}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S-%f')}"
        partial = final.with_name(f".{final.name}.partial")
        try:
            write_json(partial / "probe.json", self.to_json())
            (partial / "probe.md").write_text(self.markdown())
            save_png(figure(self), partial / "figures" / "probe.png")
            partial.rename(final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write {final} ({error.strerror}); free space or set output_root") from None
        return final


def figure(result: ProbeResult) -> Any:
    """Bits against measured KL, schemes and controls apart."""
    import pandas as pd

    from layerbits.figures import pareto

    def label(s: SchemeProbe) -> str:
        if not s.control:
            return "schemes"
        return "first_last" if s.scheme.endswith("first_last") else "random"

    frame = pd.DataFrame(
        {
            "bits": [s.effective_bits for s in result.schemes],
            "kl": [s.difference.kl for s in result.schemes],
            "label": [label(s) for s in result.schemes],
        }
    )
    return pareto(frame, "kl", title=f"{result.model.name}: measured KL on {result.data.tokens:,} held-out tokens")


def _words(difference: Difference) -> tuple[str, str]:
    return (
        f"{difference.perplexity:.4f}",
        f"{difference.top1_agreement:.4f} | {difference.logit_mse:.4g} | {difference.logit_max_error:.4g}",
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
