"""The proof that an exported checkpoint is what was scored, as a typed report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from layerbits.checkpoint.compare import ERROR_RATIO, SCALE_ROUNDING, ExcludedProof, LayerProof
from layerbits.checkpoint.config_file import ConfigProof
from layerbits.checkpoint.logits import BOUND, DRIFT_BOUND, LogitProof
from layerbits.checkpoint.structure import Check
from layerbits.errors import UserError
from layerbits.plain import JsonObject, finite_object

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Record:
    """Which checkpoint this is.

    Attributes:
        scheme: Name of the scheme.
        scheme_digest: Its content hash.
        recipe: Digest of all that the weights are made from: scheme, calibration, dtype, KV cache.
        weights: Digest of the exported tensors.
        format: ``modelopt`` or ``compressed-tensors``.
        labels: Label → number of linears.
        kv_cache: ``none`` or ``fp8``.
    """

    scheme: str
    scheme_digest: str
    source_run_id: str
    recipe: str
    weights: str
    format: str
    labels: Mapping[str, int]
    effective_bits: float
    kv_cache: str
    dtype: str
    device: str
    bytes: int
    source_bytes: int


@dataclass(frozen=True)
class Proof:
    """Everything that was compared.

    Attributes:
        layers: The quantized linears.
        config: The configuration beside the source's.
        kv_problems: What is wrong with the scales of the KV cache.
        same_weights: Other schemes whose weights are the same bytes though their recipe is another.
        seconds: Wall time per phase.
    """

    record: Record
    structure: tuple[Check, ...]
    layers: tuple[LayerProof, ...]
    excluded: ExcludedProof
    config: ConfigProof
    logits: LogitProof | None
    kv_problems: tuple[str, ...] = ()
    same_weights: tuple[str, ...] = ()
    seconds: Mapping[str, float] | None = None

    @property
    def problems(self) -> list[str]:
        """All that is wrong, a line each."""
        problems = [f"{c.name} - not so: {c.detail}" for c in self.structure if not c.passed]
        problems += [layer.problem for layer in self.layers if layer.problem]
        problems += [*self.excluded.problems, *self.config.problems, *self.kv_problems]
        problems += [f"its weights are the bytes of {name}, a scheme of another recipe" for name in self.same_weights]
        if self.logits is not None and self.logits.problem:
            problems.append(self.logits.problem)
        return problems

    @property
    def passed(self) -> bool:
        """Whether the checkpoint is what was scored."""
        return not self.problems

    def require(self) -> None:
        """Raises where something is wrong.

        Raises:
            UserError: The checkpoint is not what was scored.
        """
        if problems := self.problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"the export of {self.record.scheme} is not what was scored: {problems[0]}{more}")

    @property
    def summary(self) -> str:
        """The proof in a line."""
        record, logits = self.record, self.logits
        words = [
            f"{record.scheme}: {'proven' if self.passed else 'NOT PROVEN'}",
            ", ".join(f"{label} x {n}" for label, n in record.labels.items()),
            f"{record.effective_bits:.4g} bits",
            f"{record.bytes / 1e6:,.0f} MB of {record.source_bytes / 1e6:,.0f} MB",
        ]
        if logits is not None:
            words.append(f"KL {logits.kl_checkpoint:.3g} nats per token on {logits.tokens} calibration tokens")
        return "; ".join(words)

    def metrics(self) -> dict[str, float]:
        """Numbers for the tracking server; not finite ones are left out."""
        elements = sum(layer.elements for layer in self.layers)
        identical = sum(layer.identical for layer in self.layers)
        values = {
            "export/bytes": float(self.record.bytes),
            "export/size_ratio": self.record.bytes / self.record.source_bytes,
            "proof/problems": float(len(self.problems)),
            "proof/layers": float(len(self.layers)),
            "proof/weights_identical": identical / elements if elements else math.nan,
            "proof/excluded_tensors": float(self.excluded.tensors),
        }
        if self.logits is not None:
            values |= {
                "proof/logit_deviation": self.logits.deviation_ratio,
                "proof/logit_drift": self.logits.drift_ratio,
                "proof/kl_scheme": self.logits.kl_scheme,
                "proof/kl_checkpoint": self.logits.kl_checkpoint,
            }
        values |= {f"seconds/{phase}": value for phase, value in (self.seconds or {}).items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def to_json(self) -> JsonObject:
        """Plain JSON data, ``null`` for what is not a number."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "problems": self.problems,
            **finite_object(asdict(self)),
        }

    def markdown(self) -> str:
        """The report to read."""
        record, logits = self.record, self.logits
        lines = [
            f"# Proof of {record.scheme}: {'passed' if self.passed else 'FAILED'}",
            "",
            *(f"- **{problem}**" for problem in self.problems),
            "" if self.problems else f"The checkpoint is what was scored ({record.source_run_id}).",
            "",
            "| | |",
            "|---|---|",
            f"| format | {record.format} |",
            f"| labels | {', '.join(f'{k} x {n}' for k, n in record.labels.items())} |",
            f"| effective bits | {record.effective_bits:.4g} |",
            f"| size | {record.bytes / 1e6:,.1f} MB of {record.source_bytes / 1e6:,.1f} MB |",
            f"| KV cache | {record.kv_cache} |",
            f"| scheme digest | `{record.scheme_digest}` |",
            f"| recipe digest | `{record.recipe}` |",
            f"| weights digest | `{record.weights}` |",
            "",
            "## Structure",
            "",
            *(
                f"- {'ok' if c.passed else 'NOT'}: {c.name}{'' if c.passed else f' - {c.detail}'}"
                for c in self.structure
            ),
            "",
            "## Quantized weights",
            "",
            "Read back, dequantized with their scales and compared with ModelOpt's fake quantization of the source's",
            "weights at the stored scale: equal up to the rounding to the model's dtype, less than half a step of the",
            "format. Fused linears share a scale in NVFP4, which may make the error at most "
            f"{ERROR_RATIO:g} times the scored one; a scale in bfloat16 may add {SCALE_ROUNDING:.1%} of the weight.",
            "",
            "| label | linears | weights | identical in the model's dtype | worst / allowed | error / scored error |",
            "|---|---|---|---|---|---|",
            *self._by_label(),
            "",
            "## Everything else",
            "",
            f"{self.excluded.tensors} tensors ({self.excluded.bytes / 1e6:,.1f} MB) were compared bit for bit with the",
            f"source checkpoint, {self.excluded.cast} of them after the cast to the export's dtype.",
            *(f"- tied, stored once: {name}" for name in self.excluded.tied),
            *(f"- not loaded by the model: {name}" for name in self.excluded.unused),
            "",
            "## Configuration",
            "",
            f"{self.config.same} keys of `config.json` are the source's. Changed:",
            *(f"- {words}" for words in self.config.changed),
            *(f"- NOT: {words}" for words in self.config.problems),
            "",
            "## Logits",
            "",
        ]
        if logits is None:
            lines.append("Not compared.")
        else:
            lines += [
                f"Of a model built from the checkpoint alone, on {logits.tokens} positions, the KV cache left alone.",
                f"The scheme changes the unquantized model's logits by {logits.effect:.4g} root mean square.",
                "",
                "| the checkpoint against | difference / that | allowed |",
                "|---|---|---|",
                f"| the scheme at the stored numbers | {logits.deviation_ratio:.4g} | {BOUND:g} |",
                f"| the scheme as it was scored | {logits.drift_ratio:.4g} | {DRIFT_BOUND:g} |",
                "",
                f"KL from the unquantized model, nats per token: scheme {logits.kl_scheme:.4g}, checkpoint "
                f"{logits.kl_checkpoint:.4g}.",
            ]
        if self.seconds:
            lines += ["", "## Time", "", *(f"- {phase}: {value:.1f} s" for phase, value in self.seconds.items())]
        return "\n".join(lines) + "\n"

    def _by_label(self) -> list[str]:
        rows = []
        for label in dict.fromkeys(layer.label for layer in self.layers):
            mine = [layer for layer in self.layers if layer.label == label]
            elements = sum(layer.elements for layer in mine)
            share = sum(layer.identical for layer in mine) / elements
            worst = max(layer.worst for layer in mine)
            ratio = max(layer.error_ratio for layer in mine)
            rows.append(f"| {label} | {len(mine)} | {elements:,} | {share:.4%} | {worst:.3f} | {ratio:.4f} |")
        return rows


def other_schemes_with(weights: str, recipe: str, known: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Other exports with the same weights though they were made from another recipe.

    Args:
        weights: Digest of this export's tensors.
        recipe: Digest of what they were made from.
        known: Name → weights digest and recipe digest of the exports so far.
    """
    return tuple(name for name, (theirs, made_from) in known.items() if theirs == weights and made_from != recipe)
