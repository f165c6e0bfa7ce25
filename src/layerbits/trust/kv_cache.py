"""What quantizing the keys and values of one block really does, beside what was predicted for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from layerbits.errors import UserError
from layerbits.results.bootstrap import standard_error
from layerbits.results.kv_cache import KvScore
from layerbits.results.result import FloatArray
from layerbits.trust.agreement import Agreement, Captions, agreement


@dataclass(frozen=True)
class KvValidation:
    """One format of the KV cache on ``A`` attention modules.

    Attributes:
        format: Its name.
        scores: ``[A]`` what was predicted.
        measured: KL where keys and values of one module alone are quantized; its ``kl`` is ``[S, A]``.
        together: KL per token where those of all are, and its standard error over the captions.
        least: KL per token from which on a measurement counts.
    """

    format: str
    scores: tuple[KvScore, ...]
    measured: Captions
    together: tuple[float, float]
    least: float

    @property
    def predicted(self) -> FloatArray:
        """``[A]`` nats per token."""
        return np.array([score.predicted_kl for score in self.scores])

    @property
    def status(self) -> list[str]:
        """Per module: ``ok``, ``at floor`` (not told from rounding) or ``not finite``."""
        return [
            "not finite" if not math.isfinite(kl) else "ok" if kl > self.least else "at floor"
            for kl in self.measured.mean
        ]

    @property
    def agreement(self) -> Agreement:
        """The prediction against the measurement, over the modules whose status is ``ok``."""
        keep = np.array([status == "ok" for status in self.status])
        return agreement(self.predicted, self.measured, keep, True)

    def frame(self) -> pd.DataFrame:
        """A row per module, with the columns of a validation's table."""
        mean, kl, tokens = self.measured.mean, self.measured.kl, self.measured.tokens
        return pd.DataFrame(
            {
                "layer": [score.module for score in self.scores],
                "block": [score.block for score in self.scores],
                "kind": f"kv_{self.format}",
                "candidate": f"kv_{self.format}",
                "predicted_kl": self.predicted,
                "measured_kl": mean,
                "measured_kl_se": [standard_error(kl[:, a], tokens)[1] for a in range(len(mean))],
                "ratio": mean / self.predicted,
                "status": self.status,
            }
        )

    def metrics(self) -> dict[str, float]:
        """Figures for the tracking server, ``validate/kv_<format>/…``."""
        agreement = self.agreement
        values = {
            "groups": float(agreement.groups),
            "spearman": agreement.spearman.value,
            "median_ratio": agreement.median_ratio.value,
            "within_2x": agreement.within_2x.value,
            "predicted_kl_sum": float(self.predicted.sum()),
            "measured_kl_sum": float(self.measured.mean.sum()),
            "measured_kl_together": self.together[0],
            "measured_kl_together_se": self.together[1],
        }
        return {f"validate/kv_{self.format}/{name}": value for name, value in values.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, object]:
        """Everything but the captions' shares."""
        return {
            "format": self.format,
            "agreement": asdict(self.agreement),
            "measured_kl_together": self.together[0],
            "measured_kl_together_se": self.together[1],
            "layers": self.frame().to_dict("records"),
        }


def kv_markdown(results: Sequence[KvValidation]) -> list[str]:
    """A table with a row per format; nothing where there is none."""
    if not results:
        return []
    lines = [
        "",
        "## KV cache",
        "",
        "Keys and values of each block quantized alone, and those of all together; nats per token, ± SE over captions.",
        "",
        "| format | blocks | Spearman | median measured / predicted | within a factor of 2 | predicted, summed | "
        "measured, summed | measured together |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        a, mean = one.agreement, one.measured.mean
        share = f"{a.within_2x.value:.0%}" if math.isfinite(a.within_2x.value) else "–"
        lines.append(
            f"| {one.format} | {a.groups} of {len(mean)} | {a.spearman} | {a.median_ratio} | {share} | "
            f"{one.predicted.sum():.4g} | {mean.sum():.4g} | {one.together[0]:.4g} ± {one.together[1]:.1g} |"
        )
    return lines


def wanted_scores(
    reference: str, scores: Sequence[KvScore], formats: Sequence[str] | None
) -> dict[str, tuple[KvScore, ...]]:
    """What a run predicted, by format.

    Args:
        reference: The run, for errors.
        scores: Its scores of the KV cache.
        formats: What is wanted; ``None`` = all that there are.

    Raises:
        UserError: The run did not score a format that is wanted.
    """
    known = tuple(dict.fromkeys(score.format for score in scores))
    if missing := [name for name in formats or () if name not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(
            f"{reference} did not score a KV cache of {', '.join(missing)} ({has}); score it with "
            f"kv_cache={'+'.join(missing)}, or set kv_cache=none"
        )
    return {name: tuple(s for s in scores if s.format == name) for name in (known if formats is None else formats)}
