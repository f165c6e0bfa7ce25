"""May two runs be compared? One rule, by what must be the same for it, that answers with its reasons.

A run is a mapping of facts under the names that ``history.runs`` has for its columns; :func:`facts` makes one of a
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerbits.results.result import SensitivityResult

Facts = Mapping[str, object]

CALIBRATION = ("dataset_digest", "packing", "seq_len", "batch_size", "calib_samples", "score_samples")
_ROWS = ("dataset", "dataset_size", "dataset_digest", "score_samples", "packing", "score_rows", "seq_len", "batch_size")


@dataclass(frozen=True)
class Rule:
    """What must be the same.

    Attributes:
        same: Names of facts.
        known: Whether what neither run says counts as different: nothing shows that it is the same.
    """

    same: tuple[str, ...]
    known: bool = True


RANK = Rule(("model",))
"""Ranks of groups: no scale is needed."""
PREDICTED_KL = Rule(("model", "model_revision", "method"))
"""Nats per token, of whatever text."""
SCORE = Rule(("model", "model_revision", "method", *CALIBRATION))
"""Raw scores: sums over one calibration."""
ONE_SCHEME = Rule(("model_source", "model_revision", "dtype", "method", "groups_measured", *_ROWS), known=False)
"""Scores that a scheme may choose among: candidates of one model on the same rows."""
REPETITION = Rule(("model_revision", "dataset_digest", "config_hash"))
"""One measurement, made twice."""


@dataclass(frozen=True)
class Difference:
    """A fact of which two runs say other things; ``None`` = unknown."""

    name: str
    a: object
    b: object

    def __str__(self) -> str:
        words = ["unknown" if value is None else str(value) for value in (self.a, self.b)]
        short = [word[:12] for word in words]  # digests
        return f"{self.name.replace('_', ' ')}: {' and '.join(short if short[0] != short[1] else words)}"


def facts(result: SensitivityResult) -> dict[str, object]:
    """What a result says of itself; what it does not know is ``None``."""
    info, data, model = result.candidate, result.calibration, result.model
    known = {
        "model": model.name,
        "model_source": model.source,
        "model_revision": model.revision,
        "dtype": model.dtype,
        "quant_pair": info.quant_pair,
        "granularity": info.granularity,
        "config_hash": info.config_hash,
        "method": result.method,
        "groups_measured": "none" if result.measured_se is None else "some",
        "engine": result.engine,
        "seed": result.seed,
        "dataset": data.dataset,
        "dataset_size": data.size,
        "dataset_digest": data.digest,
        "calib_samples": data.calib_samples,
        "score_samples": data.score_samples,
        "score_rows": data.score_rows,
        "packing": data.packing,
        "seq_len": data.seq_len,
        "batch_size": data.batch_size,
        "device": result.device,
    }
    return {name: None if value == "" else value for name, value in known.items()}


def differences(a: Facts, b: Facts, names: Iterable[str], known: bool = False) -> list[Difference]:
    """The facts of which two runs say other things.

    Args:
        a: Facts of a run.
        b: Facts of the other.
        names: Those that count.
        known: As :attr:`Rule.known`.
    """
    pairs = [Difference(name, a.get(name), b.get(name)) for name in names]
    return [pair for pair in pairs if pair.a != pair.b or (known and pair.a is None)]


def reasons(a: Facts, b: Facts, rule: Rule) -> list[Difference]:
    """Why two runs may not be compared by a rule; empty where they may. Of different models nothing else is said."""
    why = differences(a, b, rule.same, rule.known)
    models = [one for one in why if one.name == "model"]
    return models or why
