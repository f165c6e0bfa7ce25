"""What a probe measured, as plain typed data (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.plain import JsonObject, finite_object
from layerbits.probing.slices import Slice
from layerbits.results.bootstrap import standard_error
from layerbits.results.result import ModelInfo

SCHEMA_VERSION = 1
DECIDED = 2.0
"""Standard errors from which on a difference counts: 95% for a normal mean."""


@dataclass(frozen=True)
class Difference:
    """A model against the unquantized one, over ``tokens`` positions.

    Attributes:
        perplexity: ``exp`` of the mean loss of the next token.
        kl: Mean KL divergence from the unquantized model's distribution, nats per token.
        kl_se: Standard error of it over the captions (:func:`standard_error`); NaN with fewer than two.
        kl_p99: 99th percentile of it over the tokens (linear between order statistics).
        top1_agreement: Share of the tokens with the same most likely next token.
        logit_mse: Mean squared difference over tokens and vocabulary.
        logit_max_error: Largest absolute difference.
        kl_median: Median of it over the tokens, and ``kl_p90`` the 90th percentile: a mean can hide a tail.
        slices: Mean and tail by position in the row, by confidence of the unquantized model and by source.
        nonfinite: Tokens where a logit is not a number; they make the other figures NaN.
    """

    tokens: int
    perplexity: float
    kl: float
    kl_se: float
    kl_p99: float
    top1_agreement: float
    logit_mse: float
    logit_max_error: float
    nonfinite: int = 0
    kl_median: float = math.nan
    kl_p90: float = math.nan
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class SchemeProbe:
    """One scheme's measured error beside what was predicted for it.

    Attributes:
        method: What made it: ``budget``, ``coverage``, ``kv_cache`` (a KV cache alone), or a control: ``random``,
            ``first_last``.
        control_of: Scheme that it is a control of, ``None`` for a scheme.
        predicted_kl: Predicted KL of the quantized groups and of the KV cache, summed, nats per token; NaN where one of
            them has none.
        caption_kl: ``[captions]`` KL summed over the tokens of each caption; what differences are told from chance by.
        kv_cache: Its KV cache.
        candidates: Names of the candidates that it uses.
    """

    scheme: str
    digest: str
    method: str
    control_of: str | None
    effective_bits: float
    predicted_kl: float
    difference: Difference
    caption_kl: tuple[float, ...]
    seconds: float
    kv_cache: str = NO_CACHE
    candidates: tuple[str, ...] = ()

    @property
    def additivity(self) -> float:
        """Measured over predicted KL: 1 where the damages of the groups simply add up."""
        return self.difference.kl / self.predicted_kl if self.predicted_kl > 0 else math.nan


@dataclass(frozen=True)
class Rows:
    """What was probed on: ``rows`` rows of held-out captions, ``tokens`` of them counted.

    Attributes:
        sources: Where each caption is from, by its number; empty where that is not known. Not in the record: the
            slices are.
    """

    dataset: str
    packing: str
    seq_len: int
    rows: int
    tokens: int
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two schemes of which one should have the smaller KL, on the same tokens.

    Attributes:
        lower: Scheme that should have the smaller KL.
        higher: The other.
        why: ``control`` (same bits, chosen without the scores) or ``fewer bits``.
        kl: KL of ``higher`` minus that of ``lower``, nats per token.
        se: Standard error of it over the captions, smaller than those of the two means: captions are hard for both.
    """

    lower: str
    higher: str
    why: str
    kl: float
    se: float

    @property
    def verdict(self) -> str:
        """``confirmed``, ``contradicted``, or ``undecided`` within :data:`DECIDED` standard errors."""
        if not (math.isfinite(self.kl) and math.isfinite(self.se)) or abs(self.kl) <= DECIDED * self.se:
            return "undecided"
        return "confirmed" if self.kl > 0 else "contradicted"


@dataclass(frozen=True)
class ProbeResult:
    """A probe of some schemes on one model.

    Attributes:
        reference_perplexity: Of the unquantized model.
        floor: The unquantized model against itself.
        floor_kind: How that was made, in words.
        caption_tokens: ``[captions]`` counted tokens of each caption.
        dtype: What the model computed in, which may be another than that of its weights.
        memory: GB by name: what measuring was estimated to take, and what was free.
        pictured: How many of the captions, the first ones, are about pictures; the others are plain text.
    """

    model: ModelInfo
    source_run_ids: tuple[str, ...]
    data: Rows
    reference_perplexity: float
    floor: Difference
    floor_kind: str
    caption_tokens: tuple[int, ...]
    schemes: tuple[SchemeProbe, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    dtype: str = ""
    memory: Mapping[str, float] = field(default_factory=dict)
    pictured: int = 0

    @property
    def above_floor(self) -> list[SchemeProbe]:
        """Schemes whose damage can be told from rounding."""
        return [s for s in self.schemes if s.difference.kl > self.floor.kl]

    def by_modality(self, scheme: SchemeProbe) -> dict[str, tuple[float, float]]:
        """KL on the words after pictures and on plain text, nats per token, with standard errors; empty without any."""
        parts = {"pictures": slice(None, self.pictured), "text": slice(self.pictured, None)}
        if not self.pictured:
            return {}
        kl, tokens = scheme.caption_kl, self.caption_tokens
        return {name: standard_error(kl[part], tokens[part]) for name, part in parts.items() if tokens[part]}

    def comparisons(self) -> list[Comparison]:
        """Each scheme against its controls, then against that with the next fewer bits and the same KV cache."""
        by_name = {s.scheme: s for s in self.schemes}
        comparisons = [
            self._compared(by_name[s.control_of], s, "control") for s in self.schemes if s.control_of in by_name
        ]
        own = sorted((s for s in self.schemes if s.control_of is None), key=lambda s: (s.kv_cache, -s.effective_bits))
        comparisons += [
            self._compared(more, fewer, "fewer bits")
            for more, fewer in pairwise(own)
            if fewer.kv_cache == more.kv_cache and fewer.effective_bits < more.effective_bits
        ]
        return comparisons

    def _compared(self, lower: SchemeProbe, higher: SchemeProbe, why: str) -> Comparison:
        sums = np.subtract(higher.caption_kl, lower.caption_kl)
        kl, se = standard_error(sums, self.caption_tokens)
        return Comparison(lower.scheme, higher.scheme, why, kl, se)

    def to_json(self) -> JsonObject:
        """Plain JSON data with its schema version; what is not a number becomes null."""
        plain: JsonObject = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        del plain["data"]["sources"]
        for record, probed in zip(plain["schemes"], self.schemes, strict=True):
            record["additivity"] = probed.additivity
            record["by_modality"] = self.by_modality(probed)
        plain["comparisons"] = [{**asdict(c), "verdict": c.verdict} for c in self.comparisons()]
        return finite_object(plain)

    def metrics(self) -> dict[str, float]:
        """The finite numbers by the names in ``docs/tracking.md``: ``probe/<scheme>/<number>`` and so on."""
        kinds = ("kl", "kl_se", "kl_median", "kl_p90", "kl_p99")
        names = ("perplexity", *kinds, "top1_agreement", "logit_mse", "logit_max_error")
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
            for where, (kl, se) in self.by_modality(s).items():
                values |= {f"probe/{s.scheme}/kl_{where}": kl, f"probe/{s.scheme}/kl_{where}_se": se}
        for c in self.comparisons():
            if c.why == "control":
                values[f"probe/{c.higher}/kl_above_scheme"] = c.kl
                values[f"probe/{c.higher}/kl_above_scheme_se"] = c.se
        values |= {f"seconds/{phase}": spent for phase, spent in self.seconds.items()}
        values |= {f"memory/{name}": value for name, value in self.memory.items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}
