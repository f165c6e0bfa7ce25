"""A plan on its model: the pass of the engine, and a result for each candidate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.cache import writable_cache
from layerbits.candidates.candidate import Candidate
from layerbits.candidates.capability import Capability
from layerbits.candidates.runtime import computed_by
from layerbits.config import AutoQuantSpec
from layerbits.errors import Unsupported
from layerbits.inputs.limits import check_causality, dropout_of
from layerbits.inputs.loading import load
from layerbits.inputs.models import LoadedModel
from layerbits.inputs.offload import offloaded
from layerbits.plain import Composed, JsonObject
from layerbits.provenance import peak_memory, provenance
from layerbits.results.assignment import Assignment
from layerbits.results.baseline import BaselineLoss, check_first_batch
from layerbits.results.bootstrap import with_intervals
from layerbits.results.modality import Modality, modality_of
from layerbits.results.result import (
    Allocation,
    CalibrationInfo,
    CandidateInfo,
    ModelInfo,
    SensitivityResult,
    effective_bits,
)
from layerbits.results.routing import coverage_warnings
from layerbits.stages.plan import Plan
from layerbits.stages.tower import with_tower_budget
from layerbits.stages.workbench import scored_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.scoring.job import Scores, ScoringJob
    from layerbits.scoring.state import SearchState

_STOCK_OFFLOAD = (
    "ModelOpt's own search needs all weights on the device, which memory=offload keeps in host memory; use "
    "autoquant.engine=onepass, or model.device_map=auto"
)


_DROPOUT_ON = (
    "ModelOpt's search scores in train mode, so the model's dropout of {:g} was on: the scores are of a noisier model "
    "than the one that is served; autoquant.engine=onepass scores without"
)


@dataclass(frozen=True)
class Outcome:
    """One candidate's result, and ModelOpt's search state for it."""

    result: SensitivityResult
    state: SearchState


def load_model(plan: Plan) -> LoadedModel:
    """Loads a plan's model onto its device."""
    import torch

    from layerbits.scoring import distributed

    device = distributed.device(plan.device)
    if plan.device == "cuda":
        torch.cuda.set_device(device if ":" in device else 0)
    return load(plan.resolved, plan.tokenizer, device, plan.settings.seed, _in_host_memory(plan, device))


def _in_host_memory(plan: Plan, device: str) -> bool:
    from layerbits.inputs.patches import most_patches
    from layerbits.scoring.placement import in_host_memory
    from layerbits.scoring.quantizers import distinct_settings

    together = [_search_config(c, capability) for c, capability in plan.candidates if scored_together(c)]
    spec = plan.settings.autoquant
    if spec.engine == "stock" or not together:
        if spec.memory == "offload":
            raise Unsupported(_STOCK_OFFLOAD)
        return False
    rows = (*plan.calibration.calib, *plan.calibration.score)
    tokens = max(s.input_ids.numel() for b in rows for s in b.segments)
    patches = most_patches((s for b in rows for s in b.segments), plan.resolved.config)
    settings = distinct_settings(together)
    return in_host_memory(plan.resolved, plan.scored, tokens, device, spec.memory, settings, patches)


def run(plan: Plan, root: Path, loaded: LoadedModel | None = None) -> list[Outcome]:
    """Scores a plan's candidates and solves the budget of each.

    Args:
        plan: From :func:`plan` or :meth:`Workbench.plan`.
        root: Project folder, for the git commit.
        loaded: The model, where a sweep has loaded it already.

    Returns:
        One outcome per candidate, in the plan's order.

    Raises:
        UserError: The unquantized model predicts the captions no better than guessing.
    """
    import torch

    _agree(plan)
    seconds: dict[str, float] = {}
    if loaded is None:
        start = time.perf_counter()
        loaded = load_model(plan)
        seconds["load"] = time.perf_counter() - start
    check_causality(loaded.model, plan.calibration, plan.settings.model.name)
    torch.manual_seed(plan.settings.seed)
    alone = tuple(c.info.name for c, _ in plan.candidates if not scored_together(c))
    engine = "stock" if alone else plan.settings.autoquant.engine
    if engine == "stock" and offloaded(loaded.model) is not None:
        raise Unsupported(_STOCK_OFFLOAD)
    scores = with_tower_budget(_scores(plan, loaded, engine), plan)
    scored = _Scored.of(plan, loaded, engine, alone, scores)
    facts = provenance(root)
    return [
        Outcome(
            with_intervals(scored.result(c, candidate, capability, seconds, facts)), scores.states[candidate.info.name]
        )
        for c, (candidate, capability) in enumerate(plan.candidates)
    ]


def _agree(plan: Plan) -> None:
    """Makes sure that all processes run the same plan."""
    from layerbits.scoring import distributed

    distributed.agree(
        {
            "model files": plan.resolved.revision,
            "captions": plan.captions.digest,
            "memory mode": plan.settings.autoquant.memory,
            "configuration": plan.fingerprint,
        }
    )


def _scores(plan: Plan, loaded: LoadedModel, engine: str) -> Scores:
    """Scores of an engine, those groups measured that the settings ask for."""
    from layerbits.scoring import kl, onepass, refine, stock

    spec = plan.settings.autoquant
    workdir = Path(spec.checkpoint) if spec.checkpoint else writable_cache() / "searches" / plan.fingerprint
    job = scoring_job(plan, loaded, workdir)
    by_name = stock if engine == "stock" else kl if spec.method == "kl_div" else onepass
    scores = by_name.score(job)
    return refine.refine(job, scores, spec.refine) if spec.refine else scores


@dataclass(frozen=True)
class _Scored:
    """A plan whose candidates are scored.

    Attributes:
        model: The model as it was loaded. engine: The engine that ran.
        baseline: Loss of the unquantized model.
        doubts: What a reader should know, before what is said of a candidate and after it.
        dropout: The model's dropout, for the tags; empty where it has none.
    """

    plan: Plan
    model: ModelInfo
    engine: str
    scores: Scores
    baseline: BaselineLoss
    doubts: tuple[tuple[str, ...], tuple[str, ...]]
    dropout: Mapping[str, str]

    @classmethod
    def of(cls, plan: Plan, loaded: LoadedModel, engine: str, alone: Sequence[str], scores: Scores) -> _Scored:
        """Looks at the loss, at dropout and at experts that saw few tokens.

        Args:
            plan: The plan.
            loaded: Its model.
            engine: The engine that ran.
            alone: Candidates that ModelOpt alone can score.
            scores: Its scores.

        Raises:
            UserError: The unquantized model predicts the captions no better than guessing.
        """
        settings, spec = plan.settings, plan.settings.autoquant
        baseline = BaselineLoss(scores.loss_per_token, _vocabulary(loaded.model))
        doubts = () if settings.model.random_weights else baseline.check(_opening(plan))
        noisy = dropout_of(loaded.model, loaded.model.config.get_text_config())
        on = noisy > 0 and engine == "stock" and spec.method == "gradient"
        fell_back = bool(alone) and spec.engine != "stock"
        notes = (f"{alone[0]} needs ModelOpt's own calibration: scored by engine=stock",) if fell_back else ()
        starved = coverage_warnings(scores.routing, spec.num_score_samples or len(plan.captions.captions))
        return cls(
            plan=plan,
            model=loaded.info,
            engine=engine,
            scores=scores,
            baseline=baseline,
            doubts=((*doubts, *((_DROPOUT_ON.format(noisy),) if on else ())), (*notes, *starved)),
            dropout={"dropout": f"{noisy:g}, {'on' if on else 'off'} while scoring"} if noisy > 0 else {},
        )

    def result(
        self,
        column: int,
        candidate: Candidate,
        capability: Capability,
        seconds: Mapping[str, float],
        facts: dict[str, str],
    ) -> SensitivityResult:
        """The result of one candidate.

        Args:
            column: Of the candidate in the scores.
            candidate: The candidate.
            capability: What this machine and model can run of it.
            seconds: Time by phase before the scoring.
            facts: Where the result comes from.
        """
        plan, scores, info = self.plan, self.scores, candidate.info
        spec = plan.settings.autoquant
        before, after = self.doubts
        return SensitivityResult(
            model=self.model,
            calibration=_calibration_info(plan),
            method=spec.method,
            engine=self.engine,
            seed=plan.settings.seed,
            device=plan.device,
            groups=scores.groups,
            candidate=info,
            scores=scores.raw[:, column],
            predicted_kl=scores.predicted_kl[:, column],
            allocation=_allocation(scores, column, info, spec),
            sample_kl=None if scores.sample_kl is None else scores.sample_kl[:, :, column],
            sample_tokens=scores.sample_tokens,
            baseline=self.baseline,
            nonfinite=tuple(n for n in scores.nonfinite if n.candidate == info.name),
            settings=_shown(plan.settings.composed),
            provenance=facts,
            seconds={**seconds, **scores.seconds},
            memory={**peak_memory(), **scores.memory},
            routing=scores.routing,
            kv_cache=scores.kv_cache,
            measured_se=None if scores.measured_se is None else scores.measured_se[:, column],
            modality=_modality(plan, scores, column),
            tags={**_tags(plan, capability, scores), **self.dropout, "cell": plan.cells[info.name]},
            warnings=(*before, *plan.warnings(capability), *scores.notes, *after),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _modality(plan: Plan, scores: Scores, column: int) -> Modality | None:
    """What comes from pictures under one candidate; shares are NaN where scores are not by token."""
    segments = [s for batch in plan.calibration.score for s in batch.segments]
    if not any(s.pictures for s in segments):
        return None
    images, tokens = (
        sum(n) for n in zip(*((int(s.image_tokens.sum()), s.input_ids.numel()) for s in segments), strict=True)
    )
    total, part = scores.sample_kl, scores.sample_image_kl
    if total is None or part is None:
        unknown = np.full(len(scores.groups), np.nan)
        return Modality(images, tokens, unknown, unknown, unknown, scores.image_ranges)
    return modality_of(total[:, :, column], part[:, :, column], images, tokens, scores.image_ranges)


def scoring_job(plan: Plan, loaded: LoadedModel, workdir: Path) -> ScoringJob:
    """What an engine needs to score a plan's candidates.

    Args:
        plan: The plan.
        loaded: Its model.
        workdir: Folder for search checkpoints.
    """
    from layerbits.scoring.job import ScoringJob

    spec = plan.settings.autoquant

    def watch(loss: float, tokens: int) -> None:
        if not plan.settings.model.random_weights:
            check_first_batch(loss, tokens, _vocabulary(loaded.model), _opening(plan))

    return ScoringJob(
        loaded=loaded,
        scored=plan.scored,
        configs=runtime_configs(plan),
        calibration=plan.calibration,
        method=spec.method,
        target_bits=spec.effective_bits,
        workdir=workdir,
        fingerprint=plan.fingerprint,
        memory=spec.memory,
        fixed=_fixed_configs(plan),
        fixed_kv_cache=plan.held.kv_cache,
        kv_formats=spec.kv_cache,
        seed=plan.settings.seed,
        draws=spec.draws,
        cost_model=spec.cost_model,
        active_ratio=plan.active_ratio,
        watch=watch,
    )


def runtime_configs(plan: Plan) -> dict[str, dict[str, object]]:
    """Search configs of a plan's candidates by name, as they run on this machine."""
    return {c.info.name: _search_config(c, capability) for c, capability in plan.candidates}


def _vocabulary(model: PreTrainedModel) -> int:
    """Tokens that a model chooses among."""
    return int(model.get_output_embeddings().weight.shape[0])


def _opening(plan: Plan) -> str:
    """That rows lack the token which their tokenizer has for the beginning of a text, where they do."""
    token = plan.tokenizer.bos_token_id
    first = int(plan.calibration.score[0].segments[0].input_ids[0, 0])
    if token is None or token in (first, plan.tokenizer.eos_token_id):
        return ""
    return f"its tokenizer has {plan.tokenizer.bos_token} to begin a text, but puts none"


def _allocation(scores: Scores, column: int, info: CandidateInfo, spec: AutoQuantSpec) -> Allocation:
    """The solver's choice with its bits counted honestly, and as ModelOpt counts them."""
    flags = scores.chosen[info.name]
    weights = [g.weights for g in scores.groups]
    quantized = sum(w for w, flag in zip(weights, flags, strict=True) if flag)
    total = sum(weights)
    raw = scores.raw[:, column]
    bits = [info.bits if flag else 16.0 for flag in flags]
    return Allocation(
        target_bits=spec.effective_bits,
        assignment=Assignment(info.name if flag else None for flag in flags),
        effective_bits=effective_bits(scores.groups, bits, "weight"),
        effective_bits_modelopt=16 + (info.bits_modelopt - 16) * quantized / (total + scores.other_weights),
        score=float(sum(s for s, flag in zip(raw, flags, strict=True) if flag and math.isfinite(s))),
        effective_bits_active=effective_bits(scores.groups, bits, "active_moe"),
        cost_model=spec.cost_model,
        vision_bits=spec.vision_bits,
    )


def _search_config(candidate: Candidate, capability: Capability) -> JsonObject:
    """What a search takes of a candidate, as this machine computes it."""
    return computed_by(candidate.search_config(), kernels=capability.fp4_numerics != "reference")


def _fixed_configs(plan: Plan) -> dict[str, dict[str, object]]:
    made = {c.info.name: _search_config(c, capability) for c, capability in plan.held.modules.values()}
    return {module: made[c.info.name] for module, (c, _) in plan.held.modules.items()}


def _shown(composed: Composed) -> JsonObject:
    """The configuration as it may be published: no password of a tracking URI."""
    from layerbits.tracking import redact

    tracking = {**composed["tracking"], "uri": redact(composed["tracking"]["uri"] or "") or None}
    return {**composed, "tracking": tracking}


def _calibration_info(plan: Plan) -> CalibrationInfo:
    data, spec, rows = plan.settings.dataset, plan.settings.autoquant, plan.calibration
    tokens = tuple(b.loss_tokens for b in rows.score)
    return CalibrationInfo(
        dataset=data.name,
        size=data.size,
        digest=plan.captions.digest,
        packing=data.packing,
        seq_len=spec.seq_len,
        batch_size=spec.batch_size,
        calib_samples=len(plan.captions.captions),
        score_samples=spec.num_score_samples or len(plan.captions.captions),
        calib_rows=rows.calib_rows,
        score_rows=rows.score_rows,
        loss_tokens=sum(tokens),
        batch_loss_tokens=tokens,
        padding_share=rows.padding_share,
    )


def _tags(plan: Plan, capability: Capability, scores: Scores) -> dict[str, str]:
    tags = {
        "deployable": str(capability.deployable).lower(),
        "fingerprint": plan.fingerprint,
        "resumed": str(scores.resumed).lower(),
        "pass_candidates": str(len(plan.candidates)),
    }
    if capability.fp4_numerics != "none":
        tags["fp4_numerics"] = capability.fp4_numerics
    if scores.mode:
        tags["memory_mode"] = scores.mode
    if scores.measured_se is not None:
        tags["refine"] = str(plan.settings.autoquant.refine)
    if plan.settings.model.random_weights:
        tags["weights"] = "random"
    if plan.resolved.quantization:
        tags["dequantized"] = plan.resolved.quantization.words
    return tags
