"""A scheme as a checkpoint that runtimes load: written by ModelOpt or compressed-tensors, proven by reading it back."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.atomic import scratch_folder, whole_folder, why_unwritable, write_json
from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.checkpoint.label import AUTO
from layerbits.checkpoint.reader import Checkpoint, open_checkpoint
from layerbits.errors import Unsupported, UserError
from layerbits.export.card import write_card
from layerbits.inputs.offload import offloaded
from layerbits.plain import JsonObject
from layerbits.schemes.kv_cache import with_cache
from layerbits.schemes.sizes import GIB
from layerbits.tracking.contract import calibration_data
from layerbits.tracking.made import Data, Measured

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from layerbits.checkpoint.logits import Logits
    from layerbits.checkpoint.proof import Proof, Record
    from layerbits.checkpoint.scored import ScoredLayer
    from layerbits.export.plan import ExportPlan
    from layerbits.inputs.calibration import Batch
    from layerbits.inputs.models import LoadedModel
    from layerbits.probing.apply import Ranges
    from layerbits.schemes import Scheme

MANIFEST = "layerbits.json"
_MEND = "free space or name another folder"


class NotProven(UserError):
    """The checkpoint that was written is not what was scored; ``report`` is the folder that says how."""

    def __init__(self, message: str, report: Path) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Export:
    """A checkpoint that was written and proven.

    Attributes:
        folder: The checkpoint.
        report: Folder with ``proof.md``, ``proof.json``, ``scheme.json`` and ``checkpoint.json`` (path, digest, files).
    """

    scheme: Scheme
    folder: Path
    report: Path
    proof: Proof

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers for the tracking server."""
        scheme = {
            "summary/effective_bits": self.scheme.effective_bits,
            "summary/predicted_kl": self.scheme.predicted_kl,
        }
        return {**scheme, **self.proof.metrics()}

    @property
    def data(self) -> tuple[Data, ...]:
        """What its proof computed logits on, as an MLflow dataset."""
        fields = calibration_data(self.scheme.calibration)
        return () if fields is None else (Data(fields, "calibration"),)

    def measured(self, metrics: Mapping[str, float]) -> tuple[Measured, ...]:
        """Its logged model: which metrics are of it, and what it is searched by.

        Args:
            metrics: Of the run.
        """
        name = self.scheme.title
        kinds = ("summary/", "export/", "probe/")
        calibrated = tuple(key for key in metrics if key.startswith(("summary/predicted_kl", "proof/kl_")))
        about = tuple(key for key in metrics if key.startswith(kinds) and key not in calibrated)
        predicted = _finite({"predicted_kl": self.scheme.predicted_kl})
        values = {
            "bits": self.scheme.effective_bits,
            "gib": self.proof.record.bytes / GIB,
            "predicted_ms": self.scheme.size.get("ms", math.nan),
            "probed_kl": metrics.get("probe/kl", math.nan),
        }
        dataset = self.data[0].fields["name"] if self.data else ""
        return (
            Measured(name, self.scheme.digest, about, values=_finite(values), tags=self.tags),
            Measured(name, self.scheme.digest, calibrated, dataset, predicted),
        )

    @property
    def parameters(self) -> dict[str, str]:
        """What was in force, by the names of ``docs/tracking.md``."""
        model, record = self.scheme.model, self.proof.record
        return {
            "eff.model": model.name,
            "eff.model_revision": model.revision,
            "eff.scheme": self.scheme.name,
            "eff.scheme_digest": self.scheme.digest,
            "eff.format": record.format,
            "eff.kv_cache": record.kv_cache,
            "eff.dtype": record.dtype,
            "eff.device": record.device,
        }

    @property
    def tags(self) -> dict[str, str]:
        """Where it comes from and what it is."""
        record = self.proof.record
        return {
            "source_run_id": self.scheme.source_run_id,
            "scheme": self.scheme.name,
            "checkpoint.path": str(self.folder),
            "checkpoint.digest": record.weights,
            "checkpoint.labels": ", ".join(f"{label} x {n}" for label, n in record.labels.items()),
            **self._timed,
        }

    @property
    def _timed(self) -> dict[str, str]:
        """Which step its predicted milliseconds are of, and where; nothing where no table of costs was named."""
        how, known = self.scheme.how, "ms" in self.scheme.size
        keys = {"predicted_ms.step": "step", "predicted_ms.on": "timed_on"}
        return {tag: str(how[key]) for tag, key in keys.items() if known and key in how}


@dataclass(frozen=True)
class _Scored:
    """What the proof needs of the model, which the export uses up.

    Attributes:
        source: The checkpoint that was scored, every expert with linears of its own.
        loaded: Name of every tensor that the model loads → the one that it is tied to, or itself.
        kv_ranges: Name of a scale of the KV cache → calibrated range.
        unquantized, applied: Logits on ``rows`` without and with the scheme.
    """

    source: Checkpoint
    layers: list[ScoredLayer]
    loaded: Mapping[str, str]
    kv_ranges: Mapping[str, torch.Tensor]
    unquantized: Logits
    applied: Logits
    rows: tuple[Batch, ...]
    dtype: str
    device: str


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def shared_ranges(plans: Sequence[ExportPlan], device: str) -> Ranges:
    """Static activation ranges for the schemes of some plans of one model, in one calibration."""
    from layerbits.probing.apply import find_ranges

    prepared = plans[0].prepared
    schemes = [with_cache(plan.scheme, NO_CACHE) for plan in plans]  # the exporter calibrates caches itself
    return find_ranges(prepared.load(device).model, schemes, prepared.calibration)


def export_scheme(
    plan: ExportPlan,
    device: str = "auto",
    ranges: Ranges | None = None,
    known: Mapping[str, tuple[str, str]] | None = None,
) -> Export:
    """Writes a scheme's checkpoint and proves it; the folder appears when both are done.

    The report is written beside it (``<folder>.report``), also where the proof fails.

    Args:
        plan: From :func:`layerbits.export.plan.plan_export`.
        device: ``auto``, ``cpu`` or ``cuda``.
        ranges: Static activation ranges, where they were found for several schemes together.
        known: Other exports: name → weights digest, recipe digest (:func:`known_exports`).

    Raises:
        NotProven: The checkpoint is not what was scored.
        UserError: It could not be written.
    """
    seconds: dict[str, float] = {}
    report = plan.target.with_name(f"{plan.target.name}.report")
    with _write_errors(plan.target), scratch_folder(plan.target) as folder:
        scored = _write(plan, folder, device, ranges, seconds)
        proof = _prove(plan, folder, scored, known or {}, seconds)
        record = asdict(proof.record)
        failure = _failure(proof)
        if failure is None:
            write_json(folder / MANIFEST, {"record": record, "scheme": plan.scheme.to_json()})
            write_card(folder, plan.scheme, proof)
        with whole_folder(report, _MEND) as files:
            write_json(files / "proof.json", proof.to_json())
            (files / "proof.md").write_text(proof.markdown(), "utf-8")
            plan.scheme.save(files / "scheme.json")
            if failure is None:
                files_of = sorted(file for file in folder.rglob("*") if file.is_file())
                sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files_of}
                write_json(files / "checkpoint.json", {"path": str(plan.target), "files": sizes, **record})
        if failure is not None:
            raise NotProven(f"{failure}; the report is {report}, the checkpoint was deleted", report)
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors lets nobody but the owner read; a server may run as another user
        folder.rename(plan.target)  # also over an empty folder
    return Export(plan.scheme, plan.target, report, proof)


def is_exported(target: Path, scheme: Scheme, format: str) -> bool:
    """Whether a folder is the proven export of a scheme, as an earlier start of the same job left it.

    Args:
        target: The folder.
        scheme: The scheme.
        format: As asked for; ``auto`` is any.
    """
    record = record_of(target)
    same = (record.get("scheme_digest"), record.get("kv_cache")) == (scheme.digest, scheme.kv_cache)
    return same and format in (AUTO, record.get("format"))


def record_of(folder: Path) -> JsonObject:
    """What an export proved of a folder, as :class:`layerbits.checkpoint.proof.Record` has it; empty without one."""
    try:
        record = json.loads((folder / MANIFEST).read_text("utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def known_exports(root: Path) -> dict[str, tuple[str, str]]:
    """Exports in the folders of a folder: name → weights digest, recipe digest."""
    known = {}
    for file in sorted(root.glob(f"[!.]*/{MANIFEST}")):  # not what is being written
        record = record_of(file.parent)
        if {"weights", "recipe"} <= set(record):  # else not one of ours
            known[file.parent.name] = (str(record["weights"]), str(record["recipe"]))
    return known


def _write(plan: ExportPlan, folder: Path, device: str, ranges: Ranges | None, seconds: dict[str, float]) -> _Scored:
    """Loads the model, takes down what the proof needs of it, and exports it."""
    from layerbits.checkpoint.compare import loaded_names
    from layerbits.checkpoint.experts import expert_linears, split_experts
    from layerbits.checkpoint.logits import logits_of, some_rows
    from layerbits.checkpoint.scored import scored_layers
    from layerbits.inputs.names import names_on_disk
    from layerbits.inputs.prediction_layers import prediction_module
    from layerbits.probing.apply import apply_scheme, find_ranges

    scheme, batches = plan.scheme, plan.prepared.calibration
    with _timed(seconds, "load"):
        loaded = plan.prepared.load(device)
    model = loaded.model
    on_disk = names_on_disk(model)
    experts = expert_linears(model)
    loaded_from = loaded_names(model, on_disk, experts)
    ahead = (n for n in plan.source.entries if prediction_module(n, model.config) is not None)
    loaded_from |= {name: name for name in ahead}  # not loaded, and carried
    source = split_experts(plan.source, experts)
    _check_untied(model, scheme)
    with _timed(seconds, "calibrate"):
        ranges = ranges or find_ranges(model, [scheme], batches)
    rows = some_rows(batches)
    with _timed(seconds, "logits"):
        unquantized = logits_of(model, rows)
        # as the restored checkpoint is compared: with the KV cache as it is
        with apply_scheme(model, with_cache(scheme, NO_CACHE), ranges, keep_weights=False):
            applied = logits_of(model, rows)
    streaming = offloaded(model)
    if streaming is not None:  # ModelOpt exports whole models: this one fits into host memory alone
        streaming.close()
        model.to("cpu")
    layers = scored_layers(model, scheme, plan.labels, ranges, on_disk)
    where = next(model.parameters()).device.type
    with _timed(seconds, "export"):
        kv_ranges = _write_format(plan, loaded, layers, folder, on_disk)
    kv_on_disk = {_scale_on_disk(name, on_disk): amax for name, amax in kv_ranges.items()}
    return _Scored(source, layers, loaded_from, kv_on_disk, unquantized, applied, rows, loaded.info.dtype, where)


def _write_format(
    plan: ExportPlan, loaded: LoadedModel, layers: list[ScoredLayer], folder: Path, on_disk: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Writes the files in the plan's format; ranges of the KV cache by the names of their scales in memory."""
    from layerbits.checkpoint.label import COMPRESSED

    if plan.format == COMPRESSED:
        from layerbits.checkpoint.write_compressed import write_compressed

        write_compressed(loaded.model, layers, folder, plan.source, on_disk)
        return {}
    from layerbits.checkpoint.write_modelopt import write_checkpoint

    kv_batches = plan.prepared.calibration if plan.scheme.kv_cache == "fp8" else ()
    return write_checkpoint(
        loaded.model, plan.scheme, layers, folder, plan.source, kv_batches, loaded.info.language_model
    )


def _prove(
    plan: ExportPlan, folder: Path, scored: _Scored, known: Mapping[str, tuple[str, str]], seconds: dict[str, float]
) -> Proof:
    from layerbits.checkpoint.compare import compare_excluded, compare_layer, kv_problems
    from layerbits.checkpoint.config_file import compare_config
    from layerbits.checkpoint.labels import read_quantization
    from layerbits.checkpoint.logits import compare_logits, logits_of
    from layerbits.checkpoint.proof import Proof, other_schemes_with
    from layerbits.checkpoint.restore import at_stored_numbers, restore
    from layerbits.checkpoint.structure import check_structure

    with _timed(seconds, "compare"):
        exported = open_checkpoint(folder)
        structure = check_structure(exported)
        quantization = read_quantization(exported)
        layers = tuple(
            compare_layer(exported, scored.source, quantization, layer, scored.device) for layer in scored.layers
        )
        excluded = compare_excluded(exported, scored.source, scored.layers, scored.loaded)
        config = compare_config(plan.source.folder, folder, scored.dtype)
        record = _record(plan, exported, scored)
    logits = None
    sound = all(check.passed for check in structure) and not excluded.problems and not config.problems
    if sound and not any(layer.problem for layer in layers):
        with _timed(seconds, "restore"):
            model = restore(exported, quantization, scored.device, plan.prepared.resolved.spec.trust_remote_code)
        with _timed(seconds, "restored logits"):
            restored = logits_of(model, scored.rows)
            del model
        with _timed(seconds, "reference"):
            source = plan.prepared.load(scored.device, whole=True).model
            stored = logits_of(at_stored_numbers(source, exported, quantization, scored.layers), scored.rows)
            del source
        logits = compare_logits(scored.unquantized, scored.applied, stored, restored)
    return Proof(
        record=record,
        structure=structure,
        layers=layers,
        excluded=excluded,
        config=config,
        logits=logits,
        kv_problems=tuple(kv_problems(exported, scored.kv_ranges)),
        same_weights=other_schemes_with(record.weights, record.recipe, known),
        seconds=seconds,
    )


def _record(plan: ExportPlan, exported: Checkpoint, scored: _Scored) -> Record:
    from layerbits.checkpoint.proof import Record

    scheme = plan.scheme
    static = scheme.kv_cache != NO_CACHE or any(layer.label.input_scale for layer in scored.layers)
    recipe = [scheme.digest, plan.format, scored.dtype, scheme.kv_cache, asdict(scheme.calibration) if static else None]
    return Record(
        scheme=scheme.name,
        scheme_digest=scheme.digest,
        source_run_id=scheme.source_run_id,
        recipe=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16],
        weights=exported.digest(),
        format=plan.format,
        labels=dict(Counter(layer.label.algo for layer in scored.layers)),
        effective_bits=scheme.effective_bits,
        kv_cache=scheme.kv_cache,
        dtype=scored.dtype,
        device=scored.device,
        bytes=_bytes(exported),
        source_bytes=_bytes(plan.source),
    )


def _check_untied(model: PreTrainedModel, scheme: Scheme) -> None:
    from layerbits.inputs.ties import tied_parameters

    for names in tied_parameters(model):
        modules = [name.removesuffix(".weight") for name in names]
        quantized = [module for module in modules if module in scheme.modules]
        if quantized:
            other = next(module for module in modules if module != quantized[0])
            raise Unsupported(
                f"{quantized[0]} and {other} share one weight, which an export cannot quantize in one place alone; "
                f"score the model without it: model.exclude=[{quantized[0]}] or model.lm_head=false"
            )


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.stop - entry.start for entry in checkpoint.entries.values())


def _scale_on_disk(name: str, on_disk: Mapping[str, str]) -> str:
    """``….k_proj.k_scale`` under the name of its attention in the checkpoint, whatever its projections are."""
    attention, part, leaf = name.rsplit(".", 2)
    inside = next(n for n in on_disk if n.startswith(f"{attention}.") and n.endswith("_proj.weight"))
    return f"{on_disk[inside].removesuffix(inside.removeprefix(attention))}.{part}.{leaf}"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _failure(proof: Proof) -> str | None:
    """What is wrong with the checkpoint, ``None`` where nothing is."""
    try:
        proof.require()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turns an export that cannot be written into one line with the reason."""
    try:
        yield
    except Exception as error:
        if (reason := why_unwritable(error)) is None:
            raise
        raise UserError(f"cannot write the export to {target} ({reason}); {_MEND}") from None
