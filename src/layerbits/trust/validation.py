"""What a validation found, as plain data with a table, metrics and words (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from layerbits.plain import finite, finite_object
from layerbits.report.wording import rows_words
from layerbits.results.bootstrap import TOP
from layerbits.results.frames import spearman
from layerbits.results.result import KINDS, FloatArray, Group, ModelInfo
from layerbits.trust.agreement import Agreement, Captions, agreement
from layerbits.trust.kv_cache import KvValidation, kv_markdown

SCHEMA_VERSION = 1
ABOVE_FLOOR = 2.0
"""Times the noise floor from which on a measurement counts."""


@dataclass(frozen=True)
class Prediction:
    """One ranker's ``predicted`` ``[G]``, nats per token where ``in_nats``, and what captions put into it."""

    name: str
    predicted: FloatArray
    in_nats: bool
    samples: Captions | None
    seconds: float


@dataclass(frozen=True)
class HeldOut:
    """The rows that damage was measured on."""

    dataset: str
    packing: str
    seq_len: int
    rows: int


@dataclass(frozen=True)
class Validation:
    """Predictions for ``G`` groups under one candidate against what was measured.

    Attributes:
        candidate: Its name.
        predictions: The run's own prediction first.
        measured: KL where one group alone is quantized.
        loss_change: ``[G]`` nats per token.
        all_but: ``[G]`` KL where every group but this one is quantized, or ``None``.
        together: KL per token where every group is quantized.
        floor: ``[G]`` KL per token of rounding alone, where it begins in that group.
        repeated: Largest relative difference of the scores of the run's method when computed anew; NaN where they
            were not.
        kv: What quantizing keys and values does, where the run scored that; in no figure of the groups.
        dtype: What the model computed in while it was measured.
        memory: GB by name: what measuring was estimated to take, and what was free.
        on_text: As ``measured``, on plain text; of a run with pictures, whose ``measured`` is of words after pictures.
    """

    source_run_id: str
    model: ModelInfo
    candidate: str
    config_hash: str
    groups: tuple[Group, ...]
    data: HeldOut
    predictions: tuple[Prediction, ...]
    measured: Captions
    loss_change: FloatArray
    all_but: FloatArray | None
    together: float
    floor: FloatArray
    repeated: float
    seconds: Mapping[str, float]
    provenance: Mapping[str, str]
    created: str
    kv: tuple[KvValidation, ...] = ()
    dtype: str = "float32"
    memory: Mapping[str, float] = field(default_factory=dict)
    on_text: Captions | None = None

    @property
    def rounding(self) -> str:
        """How many groups can be told from rounding, in a line."""
        above, groups = self.status.count("ok"), len(self.groups)
        more = "" if self.dtype == "float32" else "; dtype=float32 tells more"
        return f"{above} of {groups} groups can be told from the rounding of {self.dtype}{more}."

    @property
    def blind(self) -> str:
        """What would help where no group counts, ``""`` where one does."""
        if "ok" in self.status or "at floor" not in self.status:
            return ""
        help_ = "a pair of fewer bits" if self.dtype == "float32" else "dtype=float32"
        return (
            f"no group of {self.candidate} can be told from the rounding of {self.dtype} (at most "
            f"{self.floor.max():.2g} nats per token); use {help_}"
        )

    @property
    def status(self) -> list[str]:
        """Per group: ``ok``, ``at floor`` (not told from rounding) or ``not finite``."""
        names = []
        for value, floor in zip(self.measured.mean, self.floor, strict=True):
            if not math.isfinite(value):
                names.append("not finite")
            else:
                names.append("ok" if value > ABOVE_FLOOR * floor else "at floor")
        return names

    def agreement(self, prediction: Prediction, kind: str | None = None) -> Agreement:
        """A prediction against the measurement, over the groups (of a kind) whose status is ``ok``."""
        keep = np.array([s == "ok" and kind in (None, g.kind) for s, g in zip(self.status, self.groups, strict=True)])
        return agreement(prediction.predicted, self.measured, keep, prediction.in_nats, prediction.samples)

    def frame(self) -> pd.DataFrame:
        """A row per group: predictions, measurements with standard errors over captions, status."""
        own = self.predictions[0]
        mean, tokens = self.measured.mean, self.measured.tokens
        residuals = self.measured.kl - tokens[:, None] * mean
        count = len(tokens)
        error = np.sqrt((residuals**2).sum(axis=0) * count / max(count - 1, 1)) / tokens.sum()
        frame = pd.DataFrame(
            {
                "layer": [g.key for g in self.groups],
                "block": [g.block for g in self.groups],
                "kind": [g.kind for g in self.groups],
                "candidate": self.candidate,
                "predicted_kl": own.predicted,
                "measured_kl": mean,
                "measured_kl_se": error if count > 1 else math.nan,
                "noise_floor": self.floor,
                "loss_change": self.loss_change,
                "ratio": _ratio(mean, own.predicted),
                "status": self.status,
            }
        )
        if self.all_but is not None:
            frame["saved_kl"] = self.together - self.all_but
        if self.on_text is not None:
            frame["measured_kl_text"] = self.on_text.mean
        for prediction in self.predictions[1:]:
            frame[prediction.name] = prediction.predicted
        return frame

    def metrics(self) -> dict[str, float]:
        """Figures for the tracking server, ``validate/…`` of the run's own prediction and ``validate/<ranker>/…``."""
        values: dict[str, float] = {
            "validate/groups": self.status.count("ok"),
            "validate/at_floor": self.status.count("at floor"),
            "validate/nonfinite": self.status.count("not finite"),
            "validate/noise_floor": float(self.floor.max()),
            "validate/measured_kl_sum": float(np.nansum(self.measured.mean)),
            "validate/measured_kl_together": self.together,
            "validate/predicted_kl_sum": float(np.nansum(self.predictions[0].predicted)),
            "validate/repeated_difference": self.repeated,
            **{f"seconds/{name}": value for name, value in self.seconds.items()},
            **{f"memory/{name}": value for name, value in self.memory.items()},
        }
        for index, prediction in enumerate(self.predictions):
            prefix = f"validate/{prediction.name}/" if index else "validate/"
            agreement = self.agreement(prediction)
            for name in ("spearman", "kendall", "top", "median_ratio", "within_2x"):
                estimate = getattr(agreement, name)
                key = f"top{TOP}" if name == "top" else name
                values |= {f"{prefix}{key}": estimate.value}
                if not index:
                    values |= {f"{prefix}{key}_low": estimate.low, f"{prefix}{key}_high": estimate.high}
        if self.on_text is not None:
            values["validate/measured_kl_text_sum"] = float(np.nansum(self.on_text.mean))
            values["validate/text_spearman"] = spearman(self.measured.mean, self.on_text.mean)
        for kind in self.kinds:
            values[f"validate_by_kind/{kind}"] = self.agreement(self.predictions[0], kind).spearman.value
        for one in self.kv:
            values |= one.metrics()
        return values

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of linear that there are."""
        return tuple(k for k in KINDS if any(g.kind == k for g in self.groups))

    def to_json(self) -> dict[str, object]:
        """Everything but the captions' shares."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "source_run_id": self.source_run_id,
            "model": asdict(self.model),
            "candidate": self.candidate,
            "config_hash": self.config_hash,
            "held_out": {
                **asdict(self.data),
                "captions": len(self.measured.tokens),
                "tokens": self.measured.tokens.sum(),
            },
            "measured_dtype": self.dtype,
            "memory": dict(self.memory),
            "groups": {s: self.status.count(s) for s in ("ok", "at floor", "not finite")},
            "noise_floor": float(self.floor.max()),
            "measured_kl_together": self.together,
            "repeated_difference": finite(self.repeated),
            "agreement": {p.name: finite_object(asdict(self.agreement(p))) for p in self.predictions},
            "agreement_by_kind": {k: finite_object(asdict(self.agreement(self.predictions[0], k))) for k in self.kinds},
            "layers": [finite(row) for row in self.frame().to_dict("records")],
            "kv_cache": [finite_object(one.to_json()) for one in self.kv],
            "seconds": {**self.seconds, **{f"rank_{p.name}": p.seconds for p in self.predictions[1:]}},
            "provenance": dict(self.provenance),
        }


def markdown(result: Validation) -> str:
    """The validation in words: who ranks how well, by kind, and the groups that were misjudged most."""
    data, own = result.data, result.predictions[0]
    counts = {s: result.status.count(s) for s in ("ok", "at floor", "not finite")}
    predicted = float(np.nansum(own.predicted))
    lines = [
        f"# Validation of {result.candidate} on {result.model.name}",
        "",
        *([result.rounding, ""] if result.dtype != "float32" else []),
        f"Scored in {result.model.dtype}, measured in {result.dtype}. "
        f"Each of {len(result.groups)} groups was quantized alone and its KL divergence from the unquantized model "
        f"measured on {data.rows} held-out rows of {data.dataset} "
        f"({rows_words(data.dataset, data.packing, data.seq_len)}): "
        f"{result.measured.tokens.sum():,.0f} tokens of {len(result.measured.tokens)} captions. Source run: "
        f"`{result.source_run_id}`.",
        "",
        f"Counted: {counts['ok']} groups. Left out: {counts['at floor']} not above {ABOVE_FLOOR:g} × the noise floor, "
        f"at most {result.floor.max():.2g} nats per token (a group's linears summed in another order); "
        f"{counts['not finite']} not finite.",
        "",
        "| predicted by | Spearman | Kendall | top "
        f"{TOP} in common | median measured / predicted | within a factor of 2 | seconds |",
        "|---|---|---|---|---|---|---|",
        *(_row(p.name, result.agreement(p), p.seconds) for p in result.predictions),
        "",
        "In brackets: 90% intervals, from captions drawn again with replacement on both sides.",
        "",
        f"All groups together: {result.together:.4g} nats per token measured, {predicted:.4g} predicted as the sum "
        f"(measured / predicted {_ratio(result.together, predicted):.2f}).",
    ]
    if result.on_text is not None:
        lines += [
            f"Measured on the words after pictures. On plain text ({result.on_text.tokens.sum():,.0f} tokens) the "
            f"groups sum to {np.nansum(result.on_text.mean):.4g} nats per token, after pictures to "
            f"{np.nansum(result.measured.mean):.4g}; Spearman between the two "
            f"{spearman(result.measured.mean, result.on_text.mean):.3f}.",
            "",
        ]
    if math.isfinite(result.repeated):
        same = "are the same" if result.repeated == 0 else f"differ by at most {result.repeated:.1g} of their value"
        lines += [f"The run's scores computed anew {same}."]
    lines += [
        "",
        f"## Within each kind of linear ({own.name})",
        "",
        "| kind | groups | Spearman | Kendall | median measured / predicted | within a factor of 2 |",
        "|---|---|---|---|---|---|",
    ]
    for kind in result.kinds:
        a = result.agreement(own, kind)
        share = _percent(a.within_2x.value)
        lines.append(f"| {kind} | {a.groups} | {a.spearman} | {a.kendall} | {a.median_ratio} | {share} |")
    lines += kv_markdown(result.kv)
    frame = result.frame()
    counted = frame[frame["status"] == "ok"].copy()
    counted["off"] = np.abs(np.log(counted["ratio"].where(counted["ratio"] > 0)))
    lines += [
        "",
        "## Misjudged most",
        "",
        "| layer | predicted KL | measured KL | ± SE | measured / predicted |",
        "|---|---|---|---|---|",
    ]
    for row in counted.sort_values("off", ascending=False).head(TOP).to_dict("records"):
        lines.append(
            f"| {row['layer']} | {row['predicted_kl']:.3g} | {row['measured_kl']:.3g} | {row['measured_kl_se']:.1g} | "
            f"{row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _row(name: str, a: Agreement, seconds: float) -> str:
    unit = f"{a.median_ratio} | {_percent(a.within_2x.value)}" if math.isfinite(a.median_ratio.value) else "– | –"
    took = f"{seconds:.1f}" if math.isfinite(seconds) else "–"
    top = f"{a.top.value:.0f} ({a.top.low:.1f}–{a.top.high:.1f})"
    return f"| {name} | {a.spearman} | {a.kendall} | {top} | {unit} | {took} |"


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _ratio(measured: npt.ArrayLike, predicted: npt.ArrayLike) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(measured, predicted))
