"""What a sensitivity run found, as plain typed data (no torch, no modelopt, no mlflow).

Shapes: ``S`` calibration samples, ``G`` groups. What an imported result does not say is an empty
text, list or mapping, ``None`` for a count, NaN for another number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from layerbits.errors import UserError
from layerbits.plain import Composed, JsonObject, finite
from layerbits.results.assignment import Assignment
from layerbits.results.baseline import BaselineLoss
from layerbits.results.intervals import Intervals
from layerbits.results.kv_cache import KvScore
from layerbits.results.modality import Modality
from layerbits.results.naming import run_name
from layerbits.results.routing import Routing

KINDS = (
    *("qkv", "mla_q", "mla_kv", "linear_attn_in", "ssm_in", "conv", "linear_attn_out", "ssm_out", "o"),
    *("router", "gate_up", "down", "experts", "shared_gate_up", "shared_down", "lm_head", "other"),
    *("vision_qkv", "vision_out", "vision_fc1", "vision_fc2", "merger"),
)
"""Kinds of linear in the order of a decoder block.

``qkv`` and ``o`` are what leads into and out of an attention (``mla_q`` and ``mla_kv`` into one with latent queries,
keys and values), ``linear_attn_*`` and ``ssm_*`` of a linear attention and of a state-space mixer, ``conv`` its short
convolution. ``gate_up`` and ``down`` are a dense MLP, ``experts`` all routed experts of a block, ``shared_*`` the
expert that every token takes, ``router`` what chooses or weighs experts. ``vision_*`` are those of a block of the
vision tower, ``merger`` what leads from it into the language model.
"""

VISION_KINDS = KINDS[-5:]
"""Kinds outside the language model; their groups have no decoder block."""

COST_MODELS = ("weight", "active_moe")
"""Units of effective bits, ModelOpt's names: all weights alike, or routed experts by the share that a token uses."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Linears that runtimes fuse and that share one format and one score.

    Attributes:
        key: Short name, ``B00.qkv`` for the fused q/k/v of decoder block 0.
        block: Decoder block, numbered from 0; ``None`` outside the blocks (lm_head).
        kind: One of :data:`KINDS`.
        modules: Full module names in the model.
        weights: Number of weights in all of its linears.
        active: Share of them that a token uses; below 1 for routed experts.
    """

    key: str
    block: int | None
    kind: str
    modules: tuple[str, ...]
    weights: int
    active: float = 1.0


@dataclass(frozen=True)
class CandidateInfo:
    """One effective quantization format: a quant pair under a granularity overlay.

    Attributes:
        name: ``<quant_pair>`` or ``<quant_pair>/<granularity>``.
        config: Effective ModelOpt config, plain JSON types (``quant_cfg`` list and ``algorithm``).
        config_hash: Content hash of ``config``, canonical and independent of the machine.
        bits: Weight storage bits per weight, block scales included, activations never.
        bits_modelopt: What ModelOpt counts: the minimum over weight and activation quantizers.
        adjustments: What differs from the named format and why, a line each.
    """

    name: str
    quant_pair: str
    granularity: str
    format_name: str
    weight_precision: str
    activation_precision: str
    config: JsonObject
    config_hash: str
    bits: float
    bits_modelopt: float
    adjustments: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """The model that was scored; ``revision`` is a resolved commit or a content digest."""

    name: str
    source: str
    revision: str
    architecture: str
    dtype: str
    language_model: str = ""


@dataclass(frozen=True)
class CalibrationInfo:
    """What it was scored on.

    Attributes:
        digest: Digest of the captions, in order.
        loss_tokens: Tokens that the loss was taken over in the scoring batches.
        batch_loss_tokens: The same per scoring batch (``N_b`` of the predicted KL).
        padding_share: Share of padded tokens in the scoring batches.
    """

    dataset: str
    size: str
    digest: str
    packing: str
    seq_len: int | None
    batch_size: int | None
    calib_samples: int | None
    score_samples: int | None
    calib_rows: int | None
    score_rows: int | None
    loss_tokens: int | None
    batch_loss_tokens: tuple[int, ...]
    padding_share: float

    @property
    def row_shape(self) -> tuple[str, int, int]:
        """Packing, sequence length and batch size: what the rows can be built from again.

        Raises:
            UserError: They are not known.
        """
        if not self.packing or self.seq_len is None or self.batch_size is None:
            raise UserError("the calibration rows of this result are not known (it was imported); score the model anew")
        return self.packing, self.seq_len, self.batch_size


@dataclass(frozen=True)
class Allocation:
    """What a search chose for a budget of bits; its manifest and report call it ``recipe``, as ModelOpt does.

    Attributes:
        target_bits: The budget, bits per weight over the searched groups in the unit of ``cost_model``.
        assignment: What each group gets; empty where that is not known.
        effective_bits: Weight storage bits per weight that the assignment takes.
        effective_bits_modelopt: ModelOpt's own figure for it.
        score: Raw score summed over the quantized groups.
        effective_bits_active: Weight storage bits per weight that a token uses (``cost_model=active_moe``); NaN where
            an earlier version did not tell it.
        cost_model: One of :data:`COST_MODELS`.
        vision_bits: Budget of the vision tower alone, beside which ``target_bits`` counts over all other groups;
            ``None`` = they share it.
    """

    target_bits: float
    assignment: Assignment
    effective_bits: float
    effective_bits_modelopt: float
    score: float
    effective_bits_active: float = math.nan
    cost_model: str = "weight"
    vision_bits: float | None = None


@dataclass(frozen=True)
class NonFinite:
    """A score that is not a number: where it arose."""

    group: str
    candidate: str
    sample: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class SensitivityResult:
    """What a run measured: the groups of a model under one candidate.

    Attributes:
        method: ``gradient`` or ``kl_div``.
        engine: ``onepass`` or ``stock``.
        candidate: What each group was quantized with.
        scores: ``[G]`` raw scores, ModelOpt's definition; NaN where nothing finite was measured.
        predicted_kl: ``[G]`` nats per token (for ``kl_div``: measured on the calibration rows).
        sample_kl: ``[S, G]`` share of each calibration sample in ``predicted_kl`` (sums to it), or ``None``.
        sample_tokens: ``[S]`` loss tokens of each sample, or ``None``.
        allocation: What the search chose for the target budget.
        intervals: ``None`` where they are not known.
        baseline: The unquantized model on the scored rows, ``None`` where it is not known.
        settings: The composed configuration of the run.
        provenance: Versions, hardware, git commit.
        seconds: Wall time per phase. memory: peak GB per kind.
        kv_cache: What quantizing keys and values of each block costs, where it was scored.
        measured_se: ``[G]`` standard error of a ``predicted_kl`` that was measured after the pass
            (``autoquant.refine``); NaN where it is a prediction. ``None`` where none was measured.
        routing: Tokens per expert, a record per expert module.
        modality: What comes from pictures and what from words, ``None`` where no row had a picture.
        tags: Further facts for the tracking server (``fp4_numerics``, ``deployable``, …).
    """

    model: ModelInfo
    calibration: CalibrationInfo
    method: str
    engine: str
    seed: int | None
    device: str
    groups: tuple[Group, ...]
    candidate: CandidateInfo
    scores: FloatArray
    predicted_kl: FloatArray
    allocation: Allocation
    sample_kl: FloatArray | None = None
    sample_tokens: npt.NDArray[np.int64] | None = None
    intervals: Intervals | None = None
    baseline: BaselineLoss | None = None
    nonfinite: tuple[NonFinite, ...] = ()
    settings: Composed = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    routing: tuple[Routing, ...] = ()
    kv_cache: tuple[KvScore, ...] = ()
    measured_se: FloatArray | None = None
    modality: Modality | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    created: str = ""

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: An array does not fit the groups.
        """
        shape = (len(self.groups),)
        for name in ("scores", "predicted_kl"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.sample_kl is not None and self.sample_kl.shape[1:] != shape:
            raise ValueError(f"sample_kl has shape {self.sample_kl.shape}, expected (samples, {len(self.groups)})")

    @property
    def blocks(self) -> int:
        """Number of decoder blocks that have a scored group."""
        return 1 + max((g.block for g in self.groups if g.block is not None), default=-1)

    @property
    def beyond(self) -> npt.NDArray[np.bool_]:
        """``[G]`` where a predicted KL is not believable: it is above ln(vocabulary).

        A prediction that far out has left the small changes that it holds for. A measured KL (``kl_div``) may be there.
        """
        if self.baseline is None or self.method == "kl_div":
            return np.zeros(self.predicted_kl.shape, dtype=bool)
        predicted = True if self.measured_se is None else np.isnan(self.measured_se)
        return np.asarray((self.predicted_kl > self.baseline.guessing) & predicted)

    @property
    def run_name(self) -> str:
        """Name of the run: pair, dataset size, granularity and model, as far as they are known."""
        info = self.candidate
        return run_name(self.model.name, info.quant_pair, info.granularity, self.calibration.size)

    def rows(self) -> list[JsonObject]:
        """One plain record per group, most sensitive first.

        Returns:
            Records with block, kind, layer, candidate, score, predicted_kl, bits, chosen (``None`` where the
            assignment is not known), rank (1 = most sensitive; non-finite scores come last), weights and modules. Where
            intervals are known, also low and high (of the predicted KL), rank_low and rank_high (``None`` where the
            predicted KL is not finite), and tied: the groups whose order against this one is not supported. Where rows
            had pictures, also image_share, image_low and image_high. Where the baseline is known, also believable.
            Where groups were measured after the pass, also measured_se (``None`` for a prediction).
        """
        beyond, assignment = self.beyond, self.allocation.assignment
        keys = [g.key for g in self.groups]
        order = np.argsort(np.where(np.isfinite(self.scores), -self.scores, np.inf), kind="stable").tolist()
        return [
            {
                "block": (group := self.groups[g]).block,
                "kind": group.kind,
                "layer": group.key,
                "candidate": self.candidate.name,
                "score": float(self.scores[g]),
                "predicted_kl": float(self.predicted_kl[g]),
                "bits": self.candidate.bits,
                "chosen": assignment[g] == self.candidate.name if assignment else None,
                "rank": rank,
                "weights": group.weights,
                "modules": list(group.modules),
                **(self.intervals.row(g, keys) if self.intervals else {}),
                **(self.modality.row(g) if self.modality else {}),
                **({"believable": not bool(beyond[g])} if self.baseline else {}),
                **({} if self.measured_se is None else {"measured_se": finite(float(self.measured_se[g]))}),
            }
            for rank, g in enumerate(order, start=1)
        ]

    def total(self, what: str = "predicted_kl") -> float:
        """Sum of the finite ``scores`` or ``predicted_kl`` over all groups, as if all were quantized."""
        column = getattr(self, what)
        return float(column[np.isfinite(column)].sum())

    def shares(self) -> dict[str, float]:
        """Share of the total raw score by kind of linear; kinds without groups are left out."""
        total = self.total("scores")
        shares: dict[str, float] = {}
        for group, value in zip(self.groups, self.scores.tolist(), strict=True):
            shares.setdefault(group.kind, 0.0)
            if math.isfinite(value) and total > 0:
                shares[group.kind] += value / total
        return {kind: shares[kind] for kind in KINDS if kind in shares}


def costs(groups: Sequence[Group], cost_model: str) -> list[float]:
    """What each group counts in effective bits: its weights, or those of them that a token uses.

    Args:
        groups: The groups.
        cost_model: One of :data:`COST_MODELS`.
    """
    return [g.weights * (g.active if cost_model == "active_moe" else 1) for g in groups]


def effective_bits(groups: Sequence[Group], bits: Sequence[float], cost_model: str) -> float:
    """Weight storage bits per weight of all groups.

    Args:
        groups: The groups.
        bits: Bits of each group's weights.
        cost_model: One of :data:`COST_MODELS`.
    """
    counted = costs(groups, cost_model)
    return sum(c * b for c, b in zip(counted, bits, strict=True)) / sum(counted)


def bits_apart(groups: Sequence[Group], bits: Sequence[float], cost_model: str) -> tuple[float, float]:
    """Effective bits of all groups but the vision tower's, and of the tower's; both have some.

    Args:
        groups: The groups.
        bits: Bits of each group's weights.
        cost_model: One of :data:`COST_MODELS`.
    """
    tower = [group.kind in VISION_KINDS for group in groups]
    rest, own = (
        effective_bits(
            [g for g, mine in zip(groups, tower, strict=True) if mine == inside],
            [b for b, mine in zip(bits, tower, strict=True) if mine == inside],
            cost_model,
        )
        for inside in (False, True)
    )
    return rest, own


def by_kind(groups: Sequence[Group]) -> Iterator[tuple[str, list[int]]]:
    """Kinds in block order, each with the positions of its groups."""
    for kind in KINDS:
        positions = [i for i, group in enumerate(groups) if group.kind == kind]
        if positions:
            yield kind, positions
