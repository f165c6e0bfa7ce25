"""One sensitivity run: settings → result on disk. Knows nothing of MLflow."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from layerbits.atomic import dated, whole_folder
from layerbits.cache import cache_dir
from layerbits.inputs.calibration import Calibration, build_calibration
from layerbits.candidates.candidate import Candidate, check_target, resolve_candidate
from layerbits.candidates.capability import Capability, check
from layerbits.inputs.captions import CaptionSet, load_captions
from layerbits.config import AutoQuantSpec, Settings
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.models import LoadedModel, ResolvedModel, load, load_tokenizer, resolve, skeleton
from layerbits.provenance import peak_memory, provenance
from layerbits.report import write_report
from layerbits.results.result import CalibrationInfo, CandidateInfo, Recipe, SensitivityResult, write_json
from layerbits.results.bootstrap import with_intervals

if TYPE_CHECKING:
    from layerbits.scoring.job import Scores, ScoringJob

_FREE_BYTES = 200_000_000  # a result is a few MB; the search checkpoint of a 4B model about 100 MB


@dataclass(frozen=True)
class Plan:
    """Everything that could be checked without loading the model.

    Attributes:
        candidates: What one pass scores together, each with what it needs of this machine.
        scored: Names of the linears that the search may touch.
        fingerprint: Digest of all that the scores depend on (not the budget: that is solved anew).
        cells: Candidate name → digest by which a sweep finds the finished run.
    """

    settings: Settings
    candidates: tuple[tuple[Candidate, Capability], ...]
    captions: CaptionSet
    resolved: ResolvedModel
    tokenizer: Any
    calibration: Calibration
    scored: tuple[str, ...]
    device: str
    fingerprint: str
    cells: Mapping[str, str]

    def warnings(self, capability: Capability) -> tuple[str, ...]:
        """What the user should know before a candidate is scored."""
        return (*self.calibration.warnings, *capability.notes)


@dataclass(frozen=True)
class Outcome:
    """One candidate's result, and ModelOpt's search state for it."""

    result: SensitivityResult
    state: dict[str, Any]


def plan(settings: Settings) -> Plan:
    """Checks a run of one candidate before anything heavy is loaded.

    Raises:
        UserError: Whatever can be known to fail by now, with the mend.
    """
    candidate = resolve_candidate(settings.quant_pair, settings.overlay, settings.fp4, settings.experimental)
    check_target(candidate, settings.autoquant.effective_bits)
    bench = workbench(settings)
    return bench.plan([(candidate, bench.check(candidate))])


@dataclass(frozen=True)
class Workbench:
    """A model's shape, tokenizer and rows: what the candidates of one pass share."""

    settings: Settings
    captions: CaptionSet
    resolved: ResolvedModel
    tokenizer: Any
    calibration: Calibration
    linears: Mapping[str, tuple[int, int]]
    device: str

    def scored(self, candidate: Candidate) -> tuple[str, ...]:
        """Names of the linears that a candidate covers.

        Raises:
            UserError: It covers none.
        """
        head = self.settings.model.lm_head
        names = tuple(n for n in self.linears if candidate.format.covers(n, lm_head=head))
        if not names:
            raise UserError(
                f"{candidate.info.format_name} covers no linear of {self.settings.model.name}; choose another format"
            )
        return names

    def check(self, candidate: Candidate) -> Capability:
        """What a candidate needs of this machine.

        Raises:
            Unsupported: It cannot run here.
        """
        linears = {n: self.linears[n] for n in self.scored(candidate)}
        if self.settings.autoquant.method == "fisher" and not scored_together(candidate):
            raise Unsupported(
                f"{candidate.info.name} needs ModelOpt's own calibration, which has no method=fisher; "
                "use autoquant.method=gradient"
            )
        return check(candidate, linears, self.device == "cuda", self.settings.strict)

    def cell(self, candidate: Candidate, capability: Capability) -> str:
        """Digest of what a sweep goes by to find a finished run: parameters, configuration, revision and data."""
        return _digest([*self._identity([(candidate, capability)]), self.settings.autoquant.effective_bits])

    def plan(self, candidates: Sequence[tuple[Candidate, Capability]]) -> Plan:
        """A pass over candidates that cover the same linears."""
        versions = provenance(Path.cwd())
        fingerprint = _digest(
            [*self._identity(candidates), versions["version.modelopt"], versions["version.torch"]],
        )
        return Plan(
            self.settings,
            tuple(candidates),
            self.captions,
            self.resolved,
            self.tokenizer,
            self.calibration,
            self.scored(candidates[0][0]),
            self.device,
            fingerprint,
            {c.info.name: self.cell(c, capability) for c, capability in candidates},
        )

    def _identity(self, candidates: Sequence[tuple[Candidate, Capability]]) -> list[Any]:
        spec, data, model = self.settings.autoquant, self.settings.dataset, self.settings.model
        return [
            [self.resolved.source, self.resolved.revision, model.dtype, model.random_weights],
            self.scored(candidates[0][0]),
            [[c.info.config_hash, capability.fp4_numerics] for c, capability in candidates],
            [self.captions.digest, data.packing, spec.seq_len, spec.batch_size, spec.num_score_samples],
            [_method(spec), spec.engine, self.settings.seed, self.device],
        ]


def workbench(settings: Settings) -> Workbench:
    """Finds the model, reads its shape and packs the rows; loads no weights.

    Raises:
        UserError: Captions, model, tokenizer, device or disk are not what they should be.
    """
    dataset, spec = settings.dataset, settings.autoquant
    captions = load_captions(dataset.name, dataset.size, dataset.path)
    _check_disk(settings.output_root)
    device = _device(settings.device)
    resolved = resolve(settings.model)
    linears = skeleton(resolved)
    tokenizer = load_tokenizer(resolved)
    calibration = build_calibration(
        captions.captions, tokenizer, dataset.packing, spec.seq_len, spec.batch_size, spec.num_score_samples
    )
    return Workbench(settings, captions, resolved, tokenizer, calibration, linears, device)


def load_model(plan: Plan) -> LoadedModel:
    """Loads a plan's model onto its device."""
    import torch

    from layerbits.scoring import distributed

    device = distributed.device(plan.device)
    if plan.device == "cuda":
        torch.cuda.set_device(device if ":" in device else 0)
    return load(plan.resolved, plan.tokenizer, device, plan.settings.seed)


def run(plan: Plan, root: Path, loaded: LoadedModel | None = None) -> list[Outcome]:
    """Scores a plan's candidates and solves the budget of each.

    Args:
        plan: From :func:`plan` or :meth:`Workbench.plan`.
        root: Project folder, for the git commit.
        loaded: The model, where a sweep has loaded it already.

    Returns:
        One outcome per candidate, in the plan's order.
    """
    import torch

    from layerbits.scoring import kl, onepass, stock

    settings, spec = plan.settings, plan.settings.autoquant
    seconds: dict[str, float] = {}
    if loaded is None:
        start = time.perf_counter()
        loaded = load_model(plan)
        seconds["load"] = time.perf_counter() - start
    torch.manual_seed(settings.seed)
    workdir = Path(spec.checkpoint) if spec.checkpoint else cache_dir() / "searches" / plan.fingerprint
    job = scoring_job(plan, loaded, workdir)
    alone = [c.info.name for c, _ in plan.candidates if not scored_together(c)]
    fell_back = spec.engine != "stock" and bool(alone)
    engine_name = "stock" if fell_back else spec.engine
    engine = stock if engine_name == "stock" else kl if spec.method == "kl_div" else onepass
    scores = engine.score(job)
    notes = (f"{alone[0]} needs ModelOpt's own calibration: scored by engine=stock",) if fell_back else ()
    facts = provenance(root)
    return [
        Outcome(
            with_intervals(
                SensitivityResult(
                    model=loaded.info,
                    calibration=_calibration_info(plan),
                    method=spec.method,
                    engine=engine_name,
                    seed=settings.seed,
                    device=plan.device,
                    groups=scores.groups,
                    candidates=(candidate.info,),
                    scores=scores.raw[:, [c]],
                    predicted_kl=scores.predicted_kl[:, [c]],
                    recipe=_recipe(scores, c, candidate.info, spec.effective_bits),
                    sample_kl=None if scores.sample_kl is None else scores.sample_kl[:, :, [c]],
                    sample_tokens=scores.sample_tokens,
                    nonfinite=tuple(n for n in scores.nonfinite if n.candidate == candidate.info.name),
                    settings=_shown(settings.composed),
                    provenance=facts,
                    seconds={**seconds, **scores.seconds},
                    memory={**peak_memory(), **scores.memory},
                    tags={**_tags(plan, capability, scores), "cell": plan.cells[candidate.info.name]},
                    warnings=(*plan.warnings(capability), *scores.notes, *notes),
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                )
            ),
            scores.states[candidate.info.name],
        )
        for c, (candidate, capability) in enumerate(plan.candidates)
    ]


def scoring_job(plan: Plan, loaded: LoadedModel, workdir: Path) -> ScoringJob:
    """What an engine needs to score a plan's candidates.

    Args:
        plan: The plan.
        loaded: Its model.
        workdir: Folder for search checkpoints.
    """
    from layerbits.scoring.job import ScoringJob

    spec = plan.settings.autoquant
    return ScoringJob(
        loaded=loaded,
        scored=plan.scored,
        configs={c.info.name: _runtime_config(c, capability) for c, capability in plan.candidates},
        calibration=plan.calibration,
        method=spec.method,
        target_bits=spec.effective_bits,
        workdir=workdir,
        fingerprint=plan.fingerprint,
        memory=spec.memory,
        seed=plan.settings.seed,
        draws=spec.draws,
    )


def _method(spec: AutoQuantSpec) -> Any:
    return [spec.method, spec.draws] if spec.method == "fisher" else spec.method


def scored_together(candidate: Candidate) -> bool:
    """Whether one pass can score a candidate: its calibration needs nothing but ranges (no AWQ, no SmoothQuant)."""
    algorithm = candidate.info.config.get("algorithm")
    return (algorithm.get("method") if isinstance(algorithm, dict) else algorithm) in (None, "max")


def _recipe(scores: Scores, column: int, info: CandidateInfo, target_bits: float) -> Recipe:
    """The solver's choice with its bits counted honestly, and as ModelOpt counts them."""
    flags = scores.chosen[info.name]
    weights = [g.weights for g in scores.groups]
    quantized = sum(w for w, flag in zip(weights, flags, strict=True) if flag)
    total = sum(weights)
    raw = scores.raw[:, column]
    return Recipe(
        target_bits=target_bits,
        chosen=tuple(info.name if flag else None for flag in flags),
        effective_bits=16 + (info.bits - 16) * quantized / total,
        effective_bits_modelopt=16 + (info.bits_modelopt - 16) * quantized / (total + scores.other_weights),
        score=float(sum(s for s, flag in zip(raw, flags, strict=True) if flag and math.isfinite(s))),
    )


def write(outcome: Outcome, settings: Settings) -> Path:
    """Writes everything that a run leaves, complete or not at all.

    Returns:
        The result's folder.

    Raises:
        UserError: The disk is full.
    """
    final = output_directory(outcome.result, settings)
    with whole_folder(final) as partial:
        _write_files(partial, outcome)
    return final


def output_directory(result: SensitivityResult, settings: Settings) -> Path:
    """Folder of a result: ``tmp`` names it by run and time, ``publish`` by what was measured alone."""
    info, data = result.candidates[0], result.calibration
    if settings.output_layout == "publish":
        folder = f"weight-{info.weight_precision}-act-{info.activation_precision}/{info.granularity}"
        name = f"{result.model.name}_{info.quant_pair}_{data.dataset}_{data.size}"
        return settings.output_root / "publish" / folder / name
    return dated(settings.output_root, result.run_name)


def _write_files(folder: Path, outcome: Outcome) -> None:
    from modelopt.torch.utils.serialization import safe_save

    result = outcome.result
    write_report(result, folder)
    info = result.candidates[0]
    quantization = folder / "quantization"
    write_json(quantization / "effective_quant_config.json", info.config)
    (quantization / "effective_quant_config.yaml").write_text(yaml.safe_dump(info.config, sort_keys=False))
    (folder / "config").mkdir()
    (folder / "config" / "composed.yaml").write_text(yaml.safe_dump(dict(result.settings), sort_keys=False))
    write_json(folder / "autoquant" / "state.json", solver_state(result))
    # without the calibrated ranges: megabytes that a new calibration finds again
    state = {key: value for key, value in outcome.state.items() if key != "quantizer_states"}
    safe_save(state, folder / "autoquant" / "autoquant_state.pt")


def solver_state(result: SensitivityResult) -> dict[str, Any]:
    """Plain data that is enough to solve any other budget: weights, scores and bits per group."""
    manifest = result.to_manifest()
    return {
        "schema_version": manifest["schema_version"],
        "method": result.method,
        "candidates": {c.name: {"bits": c.bits, "config_hash": c.config_hash} for c in result.candidates},
        "groups": [{"layer": g.key, "modules": list(g.modules), "weights": g.weights} for g in result.groups],
        "scores": {c.name: _finite(result.scores[:, i].tolist()) for i, c in enumerate(result.candidates)},
        "predicted_kl": {c.name: _finite(result.predicted_kl[:, i].tolist()) for i, c in enumerate(result.candidates)},
        "recipe": manifest["recipe"],
    }


def _finite(values: list[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def _runtime_config(candidate: Candidate, capability: Capability) -> dict[str, Any]:
    """The search config, with our FP4 kernels named where ModelOpt's cannot run."""
    from layerbits.candidates import fp4

    config = candidate.search_config()
    if capability.fp4_numerics != "reference":
        return config
    fp4.register_backends()
    return fp4.with_reference_backend(config)


def _shown(composed: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it may be published: no password of a tracking URI."""
    from layerbits.tracking import redact

    tracking = {**composed["tracking"], "uri": redact(composed["tracking"]["uri"] or "") or None}
    return {**composed, "tracking": tracking}


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    if plan.settings.model.random_weights:
        tags["weights"] = "random"
    return tags


def _device(wanted: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device=cuda, but PyTorch sees no GPU here; use device=cpu or a machine with one")
    return "cuda" if available and wanted != "cpu" else "cpu"


def _check_disk(root: Path) -> None:
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < _FREE_BYTES:
        raise UserError(f"only {free / 1e6:.0f} MB are free at {existing}; free space or set output_root elsewhere")
