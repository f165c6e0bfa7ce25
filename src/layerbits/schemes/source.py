"""Recorded scores that schemes are made from: one sensitivity run, or several of one model on one calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.errors import UserError
from layerbits.plain import Composed
from layerbits.results.assignment import UNQUANTIZED, Assignment, IntArray
from layerbits.results.comparable import ONE_SCHEME, facts, reasons
from layerbits.results.kv_cache import kv_sums
from layerbits.results.result import CalibrationInfo, CandidateInfo, FloatArray, Group, ModelInfo, SensitivityResult
from layerbits.schemes.kv_cache import AUTO, chosen_cache
from layerbits.schemes.sizes import Sizes
from layerbits.schemes.times import Times

SETTINGS = ("model", "dataset", "autoquant", "fp4", "seed")
"""Parts of a run's configuration that load its model and data again."""


@dataclass(frozen=True)
class Source:
    """Scores of ``G`` groups under ``C`` candidates that may be compared.

    Attributes:
        run_ids: Runs or manifest files that they come from.
        method: ``gradient`` or ``kl_div``.
        scores: ``[G, C]`` raw scores; NaN = not finite, or the candidate does not cover the group.
        predicted_kl: ``[G, C]`` nats per token, NaN as above.
        cost_model: What budgets count, one of ``COST_MODELS``: that of the first run.
        all_weights: Weights in ModelOpt's denominator of effective bits; ``None`` where no run tells it.
        kv_prices: Format of the KV cache → nats per token that it costs over all blocks, where the runs scored it.
        kv_cache: What schemes made of it do to keys and values.
        sample_kl: ``[S, G, C]`` share of each caption in the predicted KL, 0 where a candidate does not cover a group;
            ``None`` where a run keeps none.
        sample_tokens: ``[S]`` loss tokens of each caption, ``None`` likewise.
        settings: The parts of the first run's configuration that load model and data.
        sizes: Bytes of its schemes; ``None`` where no budget needs them.
        times: Seconds of a step under its schemes; ``None`` where no table of costs is named.
    """

    run_ids: tuple[str, ...]
    model: ModelInfo
    calibration: CalibrationInfo
    method: str
    groups: tuple[Group, ...]
    candidates: tuple[CandidateInfo, ...]
    scores: FloatArray
    predicted_kl: FloatArray
    cost_model: str
    all_weights: int | None
    settings: Composed
    kv_prices: Mapping[str, float] = field(default_factory=dict)
    kv_cache: str = NO_CACHE
    sample_kl: FloatArray | None = None
    sample_tokens: IntArray | None = None
    sizes: Sizes | None = None
    times: Times | None = None

    def counted(self, assignment: Assignment) -> dict[str, float]:
        """What a scheme takes beside bits, as far as it is known: :meth:`Sizes.record` and :meth:`Times.record`."""
        sizes = {} if self.sizes is None else self.sizes.record(assignment)
        return sizes | ({} if self.times is None else self.times.record(assignment))

    @property
    def timed_on(self) -> dict[str, str]:
        """What the milliseconds of its schemes are of; empty where there are none."""
        return {} if self.times is None else {"step": self.times.step.name, "timed_on": self.times.where}

    def columns(self, names: Sequence[str]) -> list[int]:
        """Positions of the candidates with these names or quant pairs; all without a name.

        Raises:
            UserError: A name is not among the scored ones.
        """
        if not names:
            return list(range(len(self.candidates)))
        positions: dict[int, None] = {}
        for name in names:
            at = [i for i, c in enumerate(self.candidates) if name in (c.name, c.quant_pair)]
            if not at:
                scored = ", ".join(c.name for c in self.candidates)
                raise UserError(
                    f"{name} is not scored in {', '.join(self.run_ids)}; it has {scored}: score it too, or "
                    "choose one of those"
                )
            positions.update(dict.fromkeys(at))
        return sorted(positions)

    def scored(self, assignment: Assignment) -> tuple[IntArray, IntArray]:
        """Rows and columns of the quantized groups: the index of their scores."""
        at = assignment.positions([c.name for c in self.candidates])
        rows = np.flatnonzero(at != UNQUANTIZED)
        return rows, at[rows]


def combine(results: Mapping[str, SensitivityResult]) -> Source:
    """Puts results side by side, a column per candidate.

    Args:
        results: Run id or file → result.

    Raises:
        UserError: They are of different models or calibrations, or the same candidate comes twice.
    """
    names = list(results)
    first = results[names[0]]
    groups: dict[str, Group] = {}
    columns: dict[str, tuple[str, CandidateInfo]] = {}
    for name, result in results.items():
        if not result.allocation.assignment or math.isnan(result.candidate.bits):
            raise UserError(f"{name} was imported and does not say what its formats store; score the model anew")
        if why := reasons(facts(first), facts(result), ONE_SCHEME):
            raise UserError(
                f"{names[0]} and {name} are not of one measurement ({'; '.join(map(str, why))}), so their scores do "
                "not compare; give runs of one grid and size"
            )
        for group in result.groups:
            if groups.setdefault(group.key, group) != group:
                raise UserError(
                    f"{names[0]} and {name} have different linears in {group.key}; score them together anew"
                )
        other, _ = columns.setdefault(result.candidate.name, (name, result.candidate))
        if other != name:
            raise UserError(f"{other} and {name} both scored {result.candidate.name}; give one of them")
    row = {key: i for i, key in enumerate(groups)}
    kv_prices: dict[str, float] = {}
    for result in results.values():
        kv_prices = {**kv_sums(result.kv_cache), **kv_prices}
    scores = np.full((len(row), len(columns)), np.nan)
    predicted_kl = np.full_like(scores, np.nan)
    for c, result in enumerate(results.values()):
        rows = [row[g.key] for g in result.groups]
        scores[rows, c], predicted_kl[rows, c] = result.scores, result.predicted_kl
    sample_kl, sample_tokens = _samples(list(results.values()), row)
    return Source(
        run_ids=tuple(names),
        model=first.model,
        calibration=first.calibration,
        method=first.method,
        groups=tuple(groups.values()),
        candidates=tuple(candidate for _, candidate in columns.values()),
        scores=scores,
        predicted_kl=predicted_kl,
        cost_model=first.allocation.cost_model,
        all_weights=next((n for n in map(_all_weights, results.values()) if n is not None), None),
        settings={key: first.settings[key] for key in SETTINGS if key in first.settings},
        kv_prices=kv_prices,
        kv_cache=chosen_cache(AUTO, kv_prices),
        sample_kl=sample_kl,
        sample_tokens=sample_tokens,
    )


def _samples(results: Sequence[SensitivityResult], row: Mapping[str, int]) -> tuple[FloatArray | None, IntArray | None]:
    """The captions' shares side by side, where every result keeps them; all are of the same captions."""
    tokens = [r.sample_tokens for r in results if r.sample_kl is not None and r.sample_tokens is not None]
    if len(tokens) < len(results) or any(not np.array_equal(t, tokens[0]) for t in tokens):
        return None, None
    sample_kl = np.zeros((len(tokens[0]), len(row), len(results)))
    for c, result in enumerate(results):
        assert result.sample_kl is not None
        sample_kl[:, [row[g.key] for g in result.groups], c] = result.sample_kl
    return sample_kl, tokens[0].astype(np.int64)


def _all_weights(result: SensitivityResult) -> int | None:
    """ModelOpt's denominator, from its figure for the recorded recipe (it counts linears outside the search too)."""
    saved = sum(
        (16 - result.candidate.bits_modelopt) * group.weights
        for group, name in zip(result.groups, result.allocation.assignment, strict=True)
        if name is not None
    )
    missing = 16 - result.allocation.effective_bits_modelopt
    if not (saved > 0 and missing > 0 and math.isfinite(missing)):
        return None
    return max(round(saved / missing), sum(g.weights for g in result.groups))
