"""A model's shape, tokenizer and rows, and the checks of candidates against them; loads no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.candidates.algorithms import ranges_of
from layerbits.candidates.candidate import Candidate
from layerbits.candidates.capability import Capability, check
from layerbits.candidates.fused import shares_range
from layerbits.config import AutoQuantSpec, Settings
from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Calibration, control_tokens, opening_tokens
from layerbits.inputs.captions import CaptionSet
from layerbits.inputs.datasets import load_dataset
from layerbits.inputs.experts import active_ratio, is_routed
from layerbits.inputs.kinds import kinds_of
from layerbits.inputs.limits import check_stock, limits_of
from layerbits.inputs.loading import empty_model
from layerbits.inputs.models import (
    ResolvedModel,
    Shapes,
    load_tokenizer,
    output_head,
    resolve,
    scored_linears,
    undecided,
    unscored_patterns,
)
from layerbits.inputs.picture_rows import Reader
from layerbits.inputs.processor import reader_for
from layerbits.inputs.rows import calibration_of
from layerbits.inputs.ties import tied_linears
from layerbits.provenance import provenance
from layerbits.schemes.budgets import parts
from layerbits.scoring import refine
from layerbits.scoring.state import decisions
from layerbits.stages.inputs import check_disk
from layerbits.stages.plan import Held, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NOTHING_HELD = Held()

_STEPS = 2
"""Counts how often what a step of a search checkpoint holds was corrected; older ones are not gone on from."""


@dataclass(frozen=True)
class Workbench:
    """A model's shape, tokenizer and rows: what the candidates of one pass share.

    Attributes:
        empty: The model on the meta device, without numbers.
    """

    settings: Settings
    captions: CaptionSet
    resolved: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    reader: Reader | None
    calibration: Calibration
    empty: PreTrainedModel
    linears: Mapping[str, Shapes]
    kinds: Mapping[str, str]
    active_ratio: float | None
    device: str

    def scored(self, candidate: Candidate) -> tuple[str, ...]:
        """Names of the linears that a candidate covers.

        Raises:
            UserError: It covers none.
        """
        head = self.settings.model.lm_head
        names = tuple(n for n in self.linears if candidate.format.linear.covers(n, head, self.kinds[n]))
        if not names:
            raise UserError(
                f"{candidate.info.format_name} covers no linear of {self.settings.model.name}; choose another format"
            )
        return names

    def check(self, candidate: Candidate, scored: Sequence[str] | None = None) -> Capability:
        """What a candidate needs of this machine.

        Args:
            candidate: The candidate.
            scored: Linears that it is for; those that it covers by default.

        Raises:
            Unsupported: It cannot run here.
        """
        scored = scored or self.scored(candidate)
        linears = _by_weight({n: self.linears[n] for n in scored})
        kinds = {n: self.kinds[n] for n in scored}
        if self.settings.autoquant.method == "fisher" and not scored_together(candidate):
            raise Unsupported(
                f"{candidate.info.name} needs ModelOpt's own calibration, which has no method=fisher; "
                "use autoquant.method=gradient"
            )
        if self.settings.autoquant.engine == "stock" or not scored_together(candidate):
            check_stock(self.empty)
        spec = self.settings.autoquant
        if spec.engine == "stock" and any(shares_range(cfg) for _, cfg in candidate.format.linear.stages()):
            raise Unsupported(
                f"{candidate.info.name} shares ranges between fused linears, which ModelOpt's own search does not; "
                "use autoquant.engine=onepass"
            )
        capability = check(candidate, linears, self.device == "cuda", self.settings.strict, kinds)
        return replace(capability, notes=(*capability.notes, *undecided(self.empty)))

    def cell(self, candidate: Candidate, capability: Capability) -> str:
        """Digest of what a sweep goes by to find a finished run: parameters, configuration, revision and data."""
        return self._cell((candidate, capability), self.scored(candidate), NOTHING_HELD)

    def plan(
        self,
        candidates: Sequence[tuple[Candidate, Capability]],
        scored: tuple[str, ...] | None = None,
        held: Held = NOTHING_HELD,
    ) -> Plan:
        """A pass over candidates that cover the same linears.

        Args:
            candidates: What is scored.
            scored: Names of the linears, where another than the candidates themselves says which.
            held: What stays quantized meanwhile.

        Raises:
            UserError: More groups are to be measured than there are, or a vision tower has a budget of its own and
                none is scored.
        """
        scored = scored or self.scored(candidates[0][0])
        spec = self.settings.autoquant
        parts([spec.effective_bits], spec.vision_bits, [self.kinds[name] for name in scored])
        if wanted := spec.refine:
            groups = decisions(self.empty, unscored_patterns(self.empty, set(scored)))
            refine.check(wanted, sum(decision.searched for decision in groups))
        shared = tied_linears(self.empty, scored)
        calibration = replace(self.calibration, warnings=(*shared, *self.calibration.warnings))
        versions = provenance(Path.cwd())
        fingerprint = _digest(
            [
                *self._identity(candidates, scored, held),
                versions["version.modelopt"],
                versions["version.torch"],
                _STEPS,
            ],
        )
        return Plan(
            self.settings,
            tuple(candidates),
            self.captions,
            self.resolved,
            self.tokenizer,
            self.reader,
            calibration,
            scored,
            self.device,
            fingerprint,
            self.active_ratio,
            {c.info.name: self._cell((c, capability), scored, held) for c, capability in candidates},
            held,
        )

    def _cell(self, candidate: tuple[Candidate, Capability], scored: tuple[str, ...], held: Held) -> str:
        spec = self.settings.autoquant
        unit = [] if spec.cost_model == "weight" else [[spec.cost_model, self.active_ratio]]
        refined = [["refine", spec.refine]] if spec.refine else []
        tower = [] if spec.vision_bits is None else [["vision_bits", spec.vision_bits]]
        return _digest([*self._identity([candidate], scored, held), spec.effective_bits, *unit, *refined, *tower])

    def _identity(
        self,
        candidates: Sequence[tuple[Candidate, Capability]],
        scored: tuple[str, ...],
        held: Held,
    ) -> list[object]:
        spec, data, model = self.settings.autoquant, self.settings.dataset, self.settings.model
        return [
            [
                *(self.resolved.source, self.resolved.revision, model.dtype, model.random_weights),
                *(["code of its own"] if model.trust_remote_code else []),
                *(["corrected"] if _corrected(self.resolved.config) else []),
            ],
            scored,
            [[c.info.config_hash, capability.fp4_numerics] for c, capability in candidates],
            [
                *(self.captions.digest, data.packing, spec.seq_len, spec.batch_size, spec.num_score_samples),
                *data.pictured(),
            ],
            *self._reading(),
            [_method(spec), spec.engine, self.settings.seed, self.device],
            *held.identity(),
            *([list(spec.kv_cache)] if spec.kv_cache else []),
        ]

    def _reading(self) -> list[object]:
        """How the tokenizer reads the captions, where earlier versions read them otherwise."""
        lead = opening_tokens(self.tokenizer)
        opening = [["opens with", *lead]] if lead not in ([], [self.tokenizer.bos_token_id]) else []
        texts = [caption for caption in self.captions.captions if isinstance(caption, str)]
        spelled = any(token in text for token in control_tokens(self.tokenizer) for text in texts)
        return [*opening, *(["control tokens as text"] if spelled else [])]


def workbench(settings: Settings) -> Workbench:
    """Finds the model, reads its shape and packs the rows; loads no weights.

    Raises:
        UserError: Captions, model, tokenizer, device or disk are not what they should be.
    """
    dataset, spec = settings.dataset, settings.autoquant
    captions = load_dataset(dataset.name, dataset.size, dataset.path, dataset.share)
    check_disk(settings.output_root)
    device = device_of(settings.device)
    resolved = resolve(settings.model)
    empty = empty_model(resolved)
    linears = scored_linears(empty, settings.model)
    ratio = _active_ratio(spec, resolved, linears)
    kinds = kinds_of(empty, list(linears), output_head(empty))
    tokenizer = load_tokenizer(resolved)
    reader = reader_for(captions, resolved, tokenizer, dataset.min_pixels, dataset.max_pixels)
    calibration = calibration_of(
        captions.captions, tokenizer, reader, dataset.packing, spec.seq_len, spec.batch_size, spec.num_score_samples
    )
    doubts = limits_of(empty, resolved.config, settings.model.name).check(calibration, tokenizer)
    calibration = replace(calibration, warnings=(*doubts, *calibration.warnings, *none_left(captions)))
    return Workbench(settings, captions, resolved, tokenizer, reader, calibration, empty, linears, kinds, ratio, device)


def none_left(captions: CaptionSet) -> tuple[str, ...]:
    """That nothing is held out, where that is so: later jobs would find out after the scoring."""
    if captions.held_out:
        return ()
    return (
        f"dataset.size={captions.size} takes every caption of the list: none is left that probe and serve_check could "
        "measure on; add some at its end",
    )


def scored_together(candidate: Candidate) -> bool:
    """Whether one pass can score a candidate: its calibration needs nothing but ranges (no AWQ, no SmoothQuant)."""
    return ranges_of(candidate.info.config.get("algorithm")) is not None and not any(
        isinstance(cfg, list) for cfg in candidate.format.linear.cfgs.values()
    )


def _active_ratio(spec: AutoQuantSpec, resolved: ResolvedModel, linears: Mapping[str, Shapes]) -> float | None:
    """Share of the routed experts that a token uses.

    Raises:
        UserError: The cost model needs one that the model does not have, or does not tell.
    """
    wanted = spec.cost_model == "active_moe"
    if not any(is_routed(name) for name in linears):
        if wanted or spec.active_expert_ratio is not None:
            raise UserError(f"{resolved.spec.name} has no routed experts; use autoquant.cost_model=weight")
        return None
    ratio = spec.active_expert_ratio or active_ratio(resolved.config)
    if ratio is None and wanted:
        raise UserError(
            f"the config of {resolved.spec.name} does not tell how many experts a token uses; set "
            "autoquant.active_expert_ratio"
        )
    return ratio


def _by_weight(linears: Mapping[str, Shapes]) -> dict[str, tuple[int, int]]:
    """The shape of every weight; an expert module has one per projection."""
    which = ("first", "second")
    return {
        name if len(shapes) == 1 else f"{name} ({at} projection)": shape
        for name, shapes in linears.items()
        for at, shape in zip(which, shapes, strict=False)
    }


def _corrected(config: PreTrainedConfig) -> bool:
    """Whether earlier versions scored a model wrongly, so that a sweep does not take their runs for finished.

    Their ``memory=lean`` lost the gradients of shared keys and values, and they read outputs of Falcon's MLPs after the
    model had changed them in place.
    """
    text = config.get_text_config()
    return bool(getattr(text, "num_kv_shared_layers", 0)) or text.model_type == "falcon"


def _method(spec: AutoQuantSpec) -> object:
    return [spec.method, spec.draws] if spec.method == "fisher" else spec.method


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def device_of(wanted: str) -> str:
    """``cpu`` or ``cuda``, from what a user says.

    Raises:
        UserError: There is no GPU here.
    """
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device=cuda, but PyTorch sees no GPU here; use device=cpu or a machine with one")
    return "cuda" if available and wanted != "cpu" else "cpu"
