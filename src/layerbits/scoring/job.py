"""What an engine gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layerbits.inputs.calibration import Calibration
from layerbits.inputs.models import LoadedModel
from layerbits.results.kv_cache import KvScore
from layerbits.results.modality import ImageRange
from layerbits.results.result import FloatArray, Group, NonFinite
from layerbits.results.routing import Routing

if TYPE_CHECKING:
    from layerbits.scoring.kv_cache import KvCache
    from layerbits.scoring.state import SearchState


@dataclass(frozen=True)
class ScoringJob:
    """One scoring pass.

    Attributes:
        loaded: The model; an engine leaves its weights untouched and its quantizers disabled or removed.
        scored: Names of the linears that the search may touch.
        configs: Candidate name → ModelOpt config with bare quantizer names, an algorithm and our effective bits.
        calibration: Batches for the ranges and for the scores.
        target_bits: Budget in weight storage bits per weight over the scored linears, in the unit of the cost model.
        workdir: Folder for search checkpoints, shared by runs with the same fingerprint.
        fingerprint: Digest of everything that the scores depend on.
        memory: One of ``memory.MODES``.
        cost_model: One of ``results.COST_MODELS``. active_ratio: Share of the routed experts that a token uses.
        fixed: Linears that stay quantized while the others are scored → search config.
        kv_formats: Formats of the KV cache to score beside the candidates.
        fixed_kv_cache: Quantizer settings of keys and values meanwhile, ``None`` = as they are.
        seed: Of what is drawn. draws: Passes of ``method=fisher``, each with tokens drawn anew.
        watch: Told the unquantized model's mean loss on the first batch, nats, and its loss tokens, to stop the pass
            there where the loss is out of all reason.
    """

    loaded: LoadedModel
    scored: tuple[str, ...]
    configs: Mapping[str, Mapping[str, object]]
    calibration: Calibration
    method: str
    target_bits: float
    workdir: Path
    fingerprint: str
    memory: str = "auto"
    cost_model: str = "weight"
    active_ratio: float | None = None
    fixed: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    fixed_kv_cache: Mapping[str, object] | None = None
    kv_formats: tuple[str, ...] = ()
    seed: int = 0
    draws: int = 1
    watch: Callable[[float, int], None] = lambda _loss, _tokens: None


@dataclass(frozen=True)
class Scores:
    """What a pass measured, per group and candidate.

    Attributes:
        raw: ``[G, C]`` ModelOpt's scores, never clamped; NaN where not finite.
        predicted_kl: ``[G, C]`` nats per token.
        chosen: Candidate name → per group whether the solver quantized it at the job's target.
        states: Candidate name → ModelOpt's search state, accepted by ``mtq.get_auto_quantize_config``.
        other_weights: Weights of quantizable modules outside the search (ModelOpt's denominator has them too).
        loss_per_token: Mean loss of the unquantized model on the scored rows, nats.
        sample_kl: ``[S, G, C]`` or ``None``. sample_tokens: ``[S]`` or ``None``.
        memory: Estimates in GB. mode: Memory mode that ran.
        resumed: Whether a search checkpoint was used.
        routing: Tokens per expert.
        kv_cache: What quantizing keys and values costs, block by block.
        measured_se: ``[G, C]`` standard error of a KL that was measured instead of predicted
            (:mod:`layerbits.scoring.refine`), NaN elsewhere; ``None`` where none was.
        factors: Candidate name → what its predictions were multiplied by then.
        sample_image_kl: ``[S, G, C]`` of ``sample_kl`` what comes from image positions; ``None`` where no row has any.
        image_ranges: Inputs with a static range, at image positions and at words.
    """

    groups: tuple[Group, ...]
    raw: FloatArray
    predicted_kl: FloatArray
    chosen: Mapping[str, tuple[bool, ...]]
    states: Mapping[str, SearchState]
    other_weights: int
    loss_per_token: float
    sample_kl: FloatArray | None = None
    sample_tokens: npt.NDArray[np.int64] | None = None
    nonfinite: tuple[NonFinite, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    mode: str = ""
    resumed: bool = False
    routing: tuple[Routing, ...] = ()
    kv_cache: tuple[KvScore, ...] = ()
    sample_image_kl: FloatArray | None = None
    image_ranges: tuple[ImageRange, ...] = ()
    notes: tuple[str, ...] = ()
    measured_se: FloatArray | None = None
    factors: Mapping[str, float] = field(default_factory=dict)


def fixed_cache(job: ScoringJob) -> KvCache | None:
    """The KV cache that stays quantized in a job."""
    from layerbits.scoring.kv_cache import KvCache

    if job.fixed_kv_cache is None:
        return None
    return KvCache(job.loaded.model, job.fixed_kv_cache, job.loaded.info.language_model)


def kl_weights(loss_tokens: FloatArray) -> FloatArray:
    """What each batch's raw score counts in the predicted KL: ``½ · N_b² / Σ_b N_b``.

    The predicted KL, ``½ · Σ_b N_b² · raw_b / Σ_b N_b``, is half the raw score on the scale of one token's loss. Under
    a diagonal empirical Fisher it estimates the KL divergence, in nats per token, that quantizing the group alone would
    cause. It does not depend on how rows are batched.

    Args:
        loss_tokens: ``[B]`` loss tokens of each batch.

    Returns:
        ``[B]`` weights.
    """
    return loss_tokens**2 / loss_tokens.sum() / 2
