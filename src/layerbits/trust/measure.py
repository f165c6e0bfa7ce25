"""What quantizing one group, or the keys and values of one block, alone really does to held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerbits.candidates.kv_cache import KV_FORMATS
from layerbits.errors import UserError
from layerbits.inputs.calibration import Batch
from layerbits.probing.unquantized import UnquantizedLogits
from layerbits.progress import progress
from layerbits.results.bootstrap import standard_error
from layerbits.results.kv_cache import KvScore
from layerbits.results.result import VISION_KINDS, FloatArray
from layerbits.scoring.features import kept_features
from layerbits.scoring.kv_cache import KvCache
from layerbits.scoring.norms import fused_norms
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search
from layerbits.scoring.suffix import Blocks, Perturbation, SuffixRunner, find_blocks
from layerbits.trust.agreement import Captions
from layerbits.trust.kv_cache import KvValidation
from layerbits.trust.whole import WholeForwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.results.assignment import IntArray

_FLOOR_GROUPS = 4
"""Groups of which float32's noise floor is measured, for all: the first ones, from where rounding travels farthest. It
lies so far below any damage that measuring it for each group would be time lost."""


@dataclass(frozen=True)
class Damage:
    """Measured on ``S`` captions for ``G`` groups under one candidate.

    Attributes:
        alone: KL divergence where this group alone is quantized; its ``kl`` is ``[S, G]``.
        loss_change: ``[G]`` nats per token, the same forward.
        together: ``[S]`` KL where every group is quantized, nats summed over a caption's tokens.
        all_but: KL where every group but this one is quantized, or ``None`` where that was not asked for.
        floor: ``[G]`` KL per token that computing a group's linears in another order causes; in float32 the largest
            of a few groups, for all.
    """

    alone: Captions
    loss_change: FloatArray
    together: FloatArray
    all_but: Captions | None
    floor: FloatArray

    @property
    def together_mean(self) -> float:
        """KL per token where every group is quantized."""
        return float(self.together.sum() / self.alone.tokens.sum())


def measure_damage(
    model: PreTrainedModel,
    linears: ReplacedLinears,
    search: Search,
    batches: Sequence[Batch],
    disable_one: bool,
    candidate: int = 0,
) -> Damage:
    """Measures each group of a search under one of its candidates; the model itself is never changed.

    Args:
        model: A causal language model, computing in what is measured in
            (:func:`layerbits.scoring.precision.computing`).
        linears: Its scored linears, with their ranges; where the model computes in another dtype than its own, with
            fixed dtypes (:meth:`~layerbits.scoring.taps.Taps.fix_dtypes`).
        search: Its groups.
        batches: Held-out rows.
        disable_one: Whether to measure leaving one group unquantized too.
        candidate: Position of the candidate.

    Raises:
        Unsupported: The model cannot be run from a block on.
    """
    groups = range(len(search.groups))
    alone = [linears.quantized(search, g, candidate) for g in groups]
    everything = {name: forward for one in alone for name, forward in one.items()}
    exact = model.get_input_embeddings().weight.dtype == torch.float32
    recomputed = [linears.recomputed(search, g) for g in (groups[:_FLOOR_GROUPS] if exact else groups)]
    spared = [linears.unchanged(search, g) for g in groups]
    kl, change, floor, together, all_but = [], [], [], [], []
    samples = 1 + max(int(s.sample.max()) for b in batches for s in b.segments)
    with fused_norms(model), kept_features(model, batches, search.names):
        tower = any(group.kind in VISION_KINDS for group in search.groups)
        blocks = None if tower else find_blocks(model, search.names, batches[0])
        for batch in progress(batches, "measuring"):
            owner = np.concatenate([s.sample[s.loss_mask].numpy() for s in batch.segments])
            runner = _runner(model, blocks, batch)
            damage, changed = _measured(runner, [*alone, *recomputed])
            kl.append(_by_caption(damage[: len(groups)], owner, samples))
            change.append(changed[: len(groups)].sum(axis=1))
            floor.append(damage[len(groups) :].sum(axis=1))
            runner = _runner(model, blocks, batch, everything)
            damage, _ = _measured(runner, [alone[0], *(spared if disable_one else [])])
            together.append(_by_caption(damage[:1], owner, samples)[:, 0])
            all_but.append(_by_caption(damage[1:], owner, samples))
    tokens = np.zeros(samples)
    for batch in batches:
        for segment in batch.segments:
            np.add.at(tokens, segment.sample[segment.loss_mask].numpy(), 1)
    used = tokens > 0
    noise = np.sum(floor, axis=0) / tokens.sum()
    count = tokens.sum()

    def captions(parts: list[FloatArray]) -> Captions:
        return Captions(np.sum(parts, axis=0)[used], tokens[used])

    return Damage(
        alone=captions(kl),
        loss_change=np.sum(change, axis=0) / count,
        together=np.sum(together, axis=0)[used],
        all_but=captions(all_but) if disable_one else None,
        floor=np.full(len(groups), noise.max()) if exact else noise,
    )


def kv_caches(
    model: PreTrainedModel,
    predicted: Mapping[str, tuple[KvScore, ...]],
    language_model: str,
    calibration: Sequence[Batch],
) -> dict[str, KvCache]:
    """The quantized KV caches that a run priced, calibrated, by format; they keep to the dtype that the model has now.

    Args:
        model: The whole model, in its own dtype.
        predicted: Format → its scores.
        language_model: Name of the language model's module.
        calibration: Batches for the ranges.

    Raises:
        UserError: The model's attention is not what was scored.
    """
    caches = {}
    for name, scores in predicted.items():
        cache = KvCache(model, KV_FORMATS[name], language_model)
        cache.calibrate(calibration)
        if cache.modules != [score.module for score in scores]:
            raise UserError("the attention of this model is not what was scored; score it again")
        cache.fix_dtypes()
        caches[name] = cache
    return caches


def measure_kv(
    model: PreTrainedModel,
    caches: Mapping[str, KvCache],
    predicted: Mapping[str, tuple[KvScore, ...]],
    batches: Sequence[Batch],
    least: float,
) -> tuple[KvValidation, ...]:
    """Measures keys and values of each block alone, in whole forwards; the model itself is never changed.

    Args:
        model: The whole model, computing in what is measured in.
        caches: From :func:`kv_caches`.
        predicted: Format → its scores.
        batches: Held-out rows.
        least: KL per token from which on a measurement counts.
    """
    if not predicted:
        return ()
    unquantized = UnquantizedLogits(model, batches)
    tokens = np.array(unquantized.caption_tokens, dtype=np.float64)
    results = []
    for name, scores in predicted.items():
        cache = caches[name]
        alone = []
        for module in progress(cache.modules, f"measuring kv_{name}"):
            with cache.active(module):
                alone.append(unquantized.compare(model)[1])
        with cache.active():
            _, together = unquantized.compare(model)
        results.append(
            KvValidation(name, scores, Captions(np.array(alone).T, tokens), standard_error(together, tokens), least)
        )
    return tuple(results)


def _runner(
    model: PreTrainedModel, blocks: Blocks | None, batch: Batch, background: Perturbation | None = None
) -> SuffixRunner | WholeForwards:
    """What measures on a batch: from a group's block on, or in whole where a vision tower is scored."""
    if blocks is None:
        return WholeForwards(model, batch, background)
    return SuffixRunner(model, blocks, batch, background)


def _measured(
    runner: SuffixRunner | WholeForwards, perturbations: Sequence[Perturbation]
) -> tuple[FloatArray, FloatArray]:
    """``[P, n]`` KL divergence and loss change per loss token."""
    kl, change = runner.measure(perturbations)
    return kl.double().cpu().numpy(), change.double().cpu().numpy()


def _by_caption(values: FloatArray, owner: IntArray, samples: int) -> FloatArray:
    """``[samples, P]`` sums over each caption's tokens."""
    sums = np.zeros((samples, len(values)))
    np.add.at(sums, owner, values.T)
    return sums
