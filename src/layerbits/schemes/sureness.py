"""How sure a scheme is: captions drawn again, the solver again on each draw.

The predicted KL of a group is a mean over captions, and other captions give other schemes. Each draw is a set of
captions as large as the one that was scored, with replacement (:mod:`layerbits.results.bootstrap`). What the draws
agree on is sure; what the scheme loses to the best scheme of a draw is its regret. That is an upper estimate: the best
scheme of a draw fits what is chance in the draw, too. What no draw can tell is a score that is wrong on all captions;
that is what ``validate``, ``probe`` and ``autoquant.refine`` measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from layerbits.results.assignment import UNQUANTIZED, IntArray
from layerbits.results.bootstrap import FEWEST, SUPPORTED, draw, resampled
from layerbits.results.result import FloatArray
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.coverage import covered_blocks
from layerbits.schemes.make import scheme_name
from layerbits.schemes.solved import Relaxed, relaxed, solved
from layerbits.schemes.source import Source

DRAWS = 100
_FARTHEST = 64  # times as many captions
STABLE = 0.95
"""Share of the choices that are to be stable."""


@dataclass(frozen=True)
class Sureness:
    """One scheme under captions drawn again; ``G`` groups, ``K`` choices.

    Attributes:
        scheme: Its name.
        captions: Captions that were drawn from.
        draws: How often.
        choices: ``[K]`` names of the candidates that could be chosen, and at last ``None`` for unquantized.
        layers: ``[G]`` keys of the groups. blocks: ``[G]`` their blocks. kinds: ``[G]`` their kinds.
        chosen: ``[G]`` position of the scheme's own choice.
        shares: ``[G, K]`` share of the draws that choose each.
        regret: Nats per token that the scheme loses to the best of a draw, on that draw, on average.
        regret_high: The same, 95% of the draws are below it.
        predicted_kl: Of the scheme, nats per token.
        needed: Captions with which 95% of the choices would be stable; infinite where 64 times as many would not do.
    """

    scheme: str
    captions: int
    draws: int
    choices: tuple[str | None, ...]
    layers: tuple[str, ...]
    blocks: tuple[int | None, ...]
    kinds: tuple[str, ...]
    chosen: tuple[int, ...]
    shares: FloatArray
    regret: float
    regret_high: float
    predicted_kl: float
    needed: float

    @property
    def agreement(self) -> FloatArray:
        """``[G]`` share of the draws that choose what the scheme has."""
        return np.asarray(self.shares[np.arange(len(self.chosen)), list(self.chosen)])

    @property
    def stable(self) -> int:
        """Groups whose choice 95% of the draws agree with."""
        return int((self.agreement >= SUPPORTED).sum())

    @property
    def unsure(self) -> list[str]:
        """Keys of the other groups, least sure first."""
        order = np.argsort(self.agreement, kind="stable")
        return [self.layers[g] for g in order if self.agreement[g] < SUPPORTED]

    def metrics(self) -> dict[str, float]:
        """Finite numbers for the tracking server, by name."""
        values = {
            "stable_groups": float(self.stable),
            "stable_share": self.stable / len(self.chosen),
            "regret": self.regret,
            "regret_share": self.regret / self.predicted_kl if self.predicted_kl > 0 else math.nan,
            "captions_for_stable": self.needed,
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, object]:
        """Plain JSON data."""
        data = asdict(self) | {"shares": np.round(self.shares, 4).tolist(), "stable": self.stable}
        return data | {"needed": self.needed if math.isfinite(self.needed) else "inf"}


def sureness(specs: Sequence[SchemeSpec], source: Source, draws: int = DRAWS, seed: int = 0) -> list[Sureness]:
    """Draws the captions again for every scheme of some specs; controls have nothing to be sure of.

    The draws go by the predicted KL, whatever the objective: that is what captions have shares in.

    Args:
        specs: Their candidates, budgets and coverage.
        source: The scores.
        draws: How often.
        seed: Of the draws.

    Returns:
        One per scheme, in the order of :func:`layerbits.schemes.make.make_schemes`; none where the runs keep no shares
        of captions, or of too few.
    """
    tokens = source.sample_tokens
    if source.sample_kl is None or tokens is None or np.count_nonzero(tokens) < FEWEST:
        return []
    weights = draw(len(tokens), draws, seed)
    known: dict[tuple[object, ...], tuple[FloatArray, list[list[IntArray]]]] = {}
    results = []
    for spec in specs:
        if spec.control is not None:
            continue
        columns = source.columns(spec.candidates)
        key = (*columns, *spec.budgets, spec.vision_bits)
        if key not in known:  # specs that differ in coverage alone share their solutions
            drawn = _drawn(source.sample_kl, tokens, source.predicted_kl, columns, weights)
            known[key] = drawn, [_solved(spec, source, columns, values) for values in drawn]
        results += _of_spec(spec, source, columns, *known[key])
    return results


def _drawn(
    sample_kl: FloatArray, tokens: IntArray, center: FloatArray, columns: list[int], weights: FloatArray
) -> FloatArray:
    """``[draws, G, C]`` predicted KL of draws; nothing is less than 0, for the solver would take that for a gain."""
    kl = sample_kl[:, :, columns]
    drawn = resampled(kl.reshape(len(kl), -1), tokens, weights).reshape(len(weights), *kl.shape[1:])
    return np.where(np.isfinite(center[:, columns]), np.maximum(drawn, 0.0), np.nan)


def _of_spec(
    spec: SchemeSpec, source: Source, columns: list[int], drawn: FloatArray, solutions: list[list[IntArray]]
) -> list[Sureness]:
    assert source.sample_tokens is not None
    values = (source.scores if spec.objective == "score" else source.predicted_kl)[:, columns]
    own = [_covered(spec, source, values, choice) for choice in _solved(spec, source, columns, values)]
    every = [[_covered(spec, source, v, c) for c in choices] for v, choices in zip(drawn, solutions, strict=True)]
    count, captions = len(columns), int(np.count_nonzero(source.sample_tokens))
    results = []
    near = relaxed(spec, source, np.maximum(source.predicted_kl[:, columns], 0.0))
    for at, budget in enumerate(spec.budgets):
        choices = np.array([one[at] for one in every])
        lost = np.array([_damage(v, own[at]) - _damage(v, c) for v, c in zip(drawn, choices, strict=True)])
        results.append(
            Sureness(
                scheme=scheme_name(spec, budget),
                captions=captions,
                draws=len(drawn),
                choices=(*(source.candidates[c].name for c in columns), None),
                layers=tuple(g.key for g in source.groups),
                blocks=tuple(g.block for g in source.groups),
                kinds=tuple(g.kind for g in source.groups),
                chosen=tuple(np.where(own[at] == UNQUANTIZED, count, own[at]).tolist()),
                shares=_shares(choices, count),
                regret=float(lost.mean()),
                regret_high=float(np.quantile(lost, 0.95)),
                predicted_kl=_damage(source.predicted_kl[:, columns], own[at]),
                needed=_needed(spec, source, columns, drawn, near[at], captions),
            )
        )
    return results


def _solved(spec: SchemeSpec, source: Source, columns: list[int], values: FloatArray) -> list[IntArray]:
    """The assignment of each budget as positions among the spec's candidates."""
    names = [source.candidates[c].name for c in columns]
    return [assignment.positions(names) for assignment in solved(spec, source, values)]


def _covered(spec: SchemeSpec, source: Source, values: FloatArray, choice: IntArray) -> IntArray:
    """A choice ``[G]`` with the blocks left unquantized that the coverage of a spec leaves out."""
    if spec.coverage is None or spec.coverage >= 1:
        return choice
    blocks = covered_blocks(source.groups, values, spec.coverage, spec.coverage_order)
    return np.where([group.block in blocks for group in source.groups], choice, UNQUANTIZED)


def _shares(choices: IntArray, count: int) -> FloatArray:
    """``[G, K]`` share of the draws ``[draws, G]`` that choose each candidate, and at last none."""
    position = np.where(choices == UNQUANTIZED, count, choices)
    return np.stack([(position == k).mean(axis=0) for k in range(count + 1)], axis=1)


def _damage(values: FloatArray, choice: IntArray) -> float:
    """Predicted KL ``[G, C]`` of a choice ``[G]``, summed."""
    picked = np.flatnonzero(choice != UNQUANTIZED)
    return float(values[picked, choice[picked]].sum())


def _needed(
    spec: SchemeSpec, source: Source, columns: list[int], drawn: FloatArray, near: Relaxed, captions: int
) -> float:
    """Captions with which 95% of the choices would be stable, by bisection on a scale of powers of two.

    The variance of a mean over ``m`` captions goes with ``1 / m``, so the noise of the draws is scaled by its root. The
    choices are those of the relaxed problem (``near``), some of which the exact solver makes differently to use up the
    budget.
    """
    base = np.maximum(source.predicted_kl[:, columns], 0.0)
    noise, count = drawn - drawn.mean(axis=0), len(columns)

    def choices(values: FloatArray) -> IntArray:
        return np.array([_covered(spec, source, v, c) for v, c in zip(values, near.choices(values), strict=True)])

    own = choices(base[None])[0]
    at = np.where(own == UNQUANTIZED, count, own)

    def stable(doublings: float) -> bool:
        scaled = np.maximum(base + noise * 2.0 ** (-doublings / 2), 0.0)
        agreed = _shares(choices(scaled), count)[np.arange(len(at)), at]
        return float((agreed >= SUPPORTED).mean()) >= STABLE

    low, high = -3.0, math.log2(_FARTHEST)
    if not stable(high):
        return math.inf
    while high - low > 0.2:
        middle = (low + high) / 2
        low, high = (low, middle) if stable(middle) else (middle, high)
    return float(math.ceil(captions * 2.0**high))


def in_words(results: Sequence[Sureness]) -> pd.DataFrame:
    """A row per scheme, for reading."""
    return pd.DataFrame(
        {
            "scheme": [one.scheme for one in results],
            "stable": [f"{one.stable} of {len(one.chosen)}" for one in results],
            "predicted_kl": [one.predicted_kl for one in results],
            "regret": [one.regret for one in results],
            "regret_95": [one.regret_high for one in results],
            "captions": [one.captions for one in results],
            "captions_for_stable": [one.needed for one in results],
            "least sure": [", ".join(one.unsure[:3]) or "–" for one in results],
        }
    )


def by_group(results: Sequence[Sureness]) -> pd.DataFrame:
    """A row per scheme and group: what it got, the share of the draws that agree, and that of each choice."""
    rows = []
    for one in results:
        for g, layer in enumerate(one.layers):
            shares = {name or "unquantized": float(s) for name, s in zip(one.choices, one.shares[g], strict=True)}
            own = one.choices[one.chosen[g]] or "unquantized"
            facts = {"scheme": one.scheme, "layer": layer, "block": one.blocks[g], "kind": one.kinds[g]}
            rows.append({**facts, "chosen": own, "agreement": float(one.agreement[g]), **shares})
    return pd.DataFrame(rows)


_BELOW_ZERO = (
    " With coverage the scheme of a draw is not the best one, and may quantize other blocks of other sizes: regret can "
    "be below 0."
)


def markdown(results: Sequence[Sureness]) -> str:
    """A table with a row per scheme, and the groups that are least sure; nothing where there is none."""
    if not results:
        return ""
    first = results[0]
    lines = [
        "## How sure",
        "",
        f"The {first.captions} captions drawn again {first.draws} times, the solver on each draw. A choice is "
        f"stable where {SUPPORTED:.0%} of the draws make it too. Regret is what the scheme loses to the best scheme of "
        "a draw, on that draw; it is an upper estimate, since that scheme fits the draw's chance, too."
        + (_BELOW_ZERO if any(one.regret < 0 for one in results) else ""),
        "",
        "| scheme | stable choices | expected regret (nats/token) | of its predicted KL | 95% are below | "
        f"captions for {STABLE:.0%} stable | least sure |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        share = f"{one.regret / one.predicted_kl:.1%}" if one.predicted_kl > 0 else "–"
        needed = f"{one.needed:,.0f}" if math.isfinite(one.needed) else f"more than {one.captions * _FARTHEST:,}"
        unsure = one.unsure
        names = ", ".join(unsure[:4]) + (f" and {len(unsure) - 4} more" if len(unsure) > 4 else "") or "–"
        lines.append(
            f"| {one.scheme} | {one.stable} of {len(one.chosen)} | {one.regret:.3g} | {share} | {one.regret_high:.3g} "
            f"| {needed} | {names} |"
        )
    return "\n".join(lines) + "\n"
