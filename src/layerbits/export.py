"""A scheme as a checkpoint that runtimes load: written by ModelOpt, proven by reading it back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerbits.checkpoint.labels import Label, check_shape, label_of
from layerbits.checkpoint.reader import Checkpoint, open_checkpoint
from layerbits.errors import Unsupported, UserError
from layerbits.result import write_json

if TYPE_CHECKING:
    import torch

    from layerbits.apply import Ranges
    from layerbits.calibration import Batch
    from layerbits.checkpoint.compare import ScoredLayer
    from layerbits.checkpoint.logits import Logits
    from layerbits.checkpoint.proof import Proof, Record
    from layerbits.models import ResolvedModel
    from layerbits.schemes import Scheme
    from layerbits.schemes.loading import Prepared

KV_CACHES = ("none", "fp8")
MANIFEST = "layerbits.json"

_SLACK_BYTES = 64_000_000  # headers, tokenizer, scales of single rows
_ITEMSIZE = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class ExportPlan:
    """Everything that could be checked before the weights are loaded.

    Attributes:
        source: The checkpoint that was scored.
        labels: Candidate name → its label.
        target: Folder of the export; does not exist, or is empty.
        kv_cache: ``none`` or ``fp8``.
        bytes: Estimated size of the export.
    """

    prepared: Prepared
    source: Checkpoint
    labels: Mapping[str, Label]
    target: Path
    kv_cache: str
    bytes: int

    @property
    def scheme(self) -> Scheme:
        """What is exported."""
        return self.prepared.scheme


@dataclass(frozen=True)
class Export:
    """A checkpoint that was written and proven."""

    folder: Path
    proof: Proof


@dataclass(frozen=True)
class _Scored:
    """What the proof needs of the model, which the export uses up.

    Attributes:
        loaded: Name of every tensor that the model loads → the one that it is tied to, or itself.
        kv_ranges: Name of a scale of the KV cache → calibrated range.
        unquantized, applied: Logits on ``rows`` without and with the scheme.
    """

    layers: list[ScoredLayer]
    loaded: Mapping[str, str]
    kv_ranges: Mapping[str, torch.Tensor]
    unquantized: Logits
    applied: Logits
    rows: tuple[Batch, ...]
    dtype: str
    device: str


def plan_export(prepared: Prepared, target: Path, kv_cache: str = "none") -> ExportPlan:
    """Checks an export before anything heavy is loaded.

    Args:
        prepared: The scheme with its model and calibration rows.
        target: Folder of the export.
        kv_cache: ``fp8`` calibrates and stores scales of an FP8 KV cache as well.

    Raises:
        UserError: The folder is not empty, the disk too small, or the source checkpoint cannot be read.
        Unsupported: A candidate whose label would not say what was scored, or a weight that does not fit it.
    """
    scheme = prepared.scheme
    if kv_cache not in KV_CACHES:
        raise UserError(f"kv_cache={kv_cache} is not known; use {' or '.join(KV_CACHES)}")
    if not scheme.modules:
        raise UserError(f"scheme {scheme.name} quantizes nothing; give it fewer bits")
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; name another folder, or delete it")
    labels = {info.name: label_of(info) for info in scheme.candidates}
    _check_shapes(prepared, labels)
    source = open_checkpoint(source_folder(prepared.resolved))
    plan = ExportPlan(prepared, source, labels, target, kv_cache, _estimate(scheme, source))
    existing = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.bytes:
        raise UserError(
            f"the export of {scheme.name} takes about {plan.bytes / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB "
            "free; free space or name another folder"
        )
    return plan


def export_scheme(
    plan: ExportPlan,
    device: str = "auto",
    ranges: Ranges | None = None,
    known: Mapping[str, tuple[str, str]] | None = None,
) -> Export:
    """Writes a scheme's checkpoint and proves it; the folder appears when both are done.

    The report is written beside the folder (``<folder>.proof.md`` and ``.json``), also where the proof fails.

    Args:
        plan: From :func:`plan_export`.
        device: ``auto``, ``cpu`` or ``cuda``.
        ranges: Static activation ranges, where they were found for several schemes together.
        known: Other exports: name → weights digest, recipe digest (:func:`known_exports`).

    Raises:
        UserError: The checkpoint could not be written, or is not what was scored.
    """
    seconds: dict[str, float] = {}
    with _partial(plan.target) as folder:
        scored = _write(plan, folder, device, ranges, seconds)
        proof = _prove(plan, folder, scored, known or {}, seconds)
        write_json(plan.target.with_name(f"{plan.target.name}.proof.json"), proof.to_json())
        report = plan.target.with_name(f"{plan.target.name}.proof.md")
        report.write_text(proof.markdown())
        try:
            proof.require()
        except UserError as error:
            raise UserError(f"{error}; the report is {report}, the checkpoint was deleted") from None
        write_json(folder / MANIFEST, {"record": asdict(proof.record), "scheme": plan.scheme.to_json()})
        if plan.target.exists():
            plan.target.rmdir()
        folder.rename(plan.target)
    return Export(plan.target, proof)


def known_exports(root: Path) -> dict[str, tuple[str, str]]:
    """Exports in the folders of a folder: name → weights digest, recipe digest."""
    known = {}
    for file in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            record = json.loads(file.read_text())["record"]
            known[file.parent.name] = (str(record["weights"]), str(record["recipe"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # not one of ours
    return known


def source_folder(resolved: ResolvedModel) -> Path:
    """Folder with the files of a model; from the hub, tokenizer and processor files are fetched with it.

    Raises:
        UserError: The model has no files: its weights are random.
    """
    if resolved.spec.random_weights:
        raise UserError(f"{resolved.spec.name} has random weights and no checkpoint; save it and score it from there")
    local = Path(resolved.source)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            resolved.source,
            revision=resolved.spec.revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.py"],
        )
    )


def _write(plan: ExportPlan, folder: Path, device: str, ranges: Ranges | None, seconds: dict[str, float]) -> _Scored:
    """Loads the model, takes down what the proof needs of it, and exports it."""
    from layerbits.apply import apply_scheme, find_ranges
    from layerbits.checkpoint.compare import loaded_names
    from layerbits.checkpoint.logits import logits_of, some_rows
    from layerbits.checkpoint.names import names_on_disk
    from layerbits.checkpoint.write import scored_layers, write_checkpoint

    scheme, batches = plan.scheme, plan.prepared.calibration
    with _timed(seconds, "load"):
        loaded = plan.prepared.load(device)
    model = loaded.model
    on_disk = names_on_disk(model)
    loaded_from = loaded_names(model, on_disk)
    _check_untied(model, scheme)
    with _timed(seconds, "calibrate"):
        ranges = ranges or find_ranges(model, [scheme], batches)
    rows = some_rows(batches)
    with _timed(seconds, "logits"):
        unquantized = logits_of(model, rows)
        with apply_scheme(model, scheme, ranges, keep_weights=False):
            applied = logits_of(model, rows)
    layers = scored_layers(model, scheme, plan.labels, ranges, on_disk)
    where = next(model.parameters()).device.type
    with _timed(seconds, "export"):
        kv_batches = batches if plan.kv_cache == "fp8" else ()
        try:
            kv_ranges = write_checkpoint(
                model, scheme, layers, folder, plan.source.folder, kv_batches, loaded.info.language_model
            )
        except OSError as error:
            raise UserError(
                f"cannot write the export to {plan.target} ({error.strerror or error}); free space"
            ) from None
    kv_on_disk = {_scale_on_disk(name, on_disk): amax for name, amax in kv_ranges.items()}
    return _Scored(layers, loaded_from, kv_on_disk, unquantized, applied, rows, loaded.info.dtype, where)


def _prove(
    plan: ExportPlan, folder: Path, scored: _Scored, known: Mapping[str, tuple[str, str]], seconds: dict[str, float]
) -> Proof:
    from layerbits.checkpoint.compare import compare_excluded, compare_layer, kv_problems
    from layerbits.checkpoint.logits import compare_logits, logits_of
    from layerbits.checkpoint.proof import LOGIT_BOUND, Proof, other_schemes_with
    from layerbits.checkpoint.restore import restore
    from layerbits.checkpoint.structure import check_structure, read_quantization

    with _timed(seconds, "compare"):
        exported = open_checkpoint(folder)
        structure = check_structure(exported)
        quantization = read_quantization(exported)
        layers = tuple(
            compare_layer(exported, plan.source, quantization, layer, scored.device) for layer in scored.layers
        )
        excluded = compare_excluded(exported, plan.source, scored.layers, scored.loaded)
        record = _record(plan, exported, scored)
    logits = None
    if all(check.passed for check in structure) and not any(layer.problem for layer in layers):
        with _timed(seconds, "restore"):
            restored = logits_of(restore(exported, quantization, scored.device), scored.rows)
        bound = LOGIT_BOUND[all(layer.label.exact for layer in scored.layers)]
        logits = compare_logits(scored.unquantized, scored.applied, restored, bound)
    return Proof(
        record=record,
        structure=structure,
        layers=layers,
        excluded=excluded,
        logits=logits,
        kv_problems=tuple(kv_problems(exported, scored.kv_ranges)),
        same_weights=other_schemes_with(record.weights, record.recipe, known),
        seconds=seconds,
    )


def _record(plan: ExportPlan, exported: Checkpoint, scored: _Scored) -> Record:
    from layerbits.checkpoint.proof import Record

    scheme = plan.scheme
    static = plan.kv_cache != "none" or any(layer.label.input_divisor for layer in scored.layers)
    recipe = [scheme.digest, scored.dtype, plan.kv_cache, asdict(scheme.calibration) if static else None]
    return Record(
        scheme=scheme.name,
        scheme_digest=scheme.digest,
        source_run_id=scheme.source_run_id,
        recipe=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16],
        weights=exported.digest(),
        labels=dict(Counter(layer.label.algo for layer in scored.layers)),
        effective_bits=scheme.effective_bits,
        kv_cache=plan.kv_cache,
        dtype=scored.dtype,
        device=scored.device,
        bytes=_bytes(exported),
        source_bytes=_bytes(plan.source),
    )


def _check_shapes(prepared: Prepared, labels: Mapping[str, Label]) -> None:
    from layerbits.models import skeleton

    linears = skeleton(prepared.resolved)
    for module, info in prepared.scheme.modules.items():
        if module not in linears:
            raise UserError(f"the model has no linear {module}; use the model that the scheme was made from")
        check_shape(info, labels[info.name], module, *linears[module])


def _check_untied(model: Any, scheme: Scheme) -> None:
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {*ties, *ties.values()}
    if shared := next((m for m in scheme.modules if f"{m}.weight" in tied), None):
        raise Unsupported(
            f"{shared} shares its weight with the embedding, which stays as it is; exclude it from the scheme "
            "(model.lm_head=false)"
        )


def _estimate(scheme: Scheme, source: Checkpoint) -> int:
    """Bytes of the export: everything in the model's dtype, quantized weights with their stored bits."""
    size = _ITEMSIZE.get(scheme.model.dtype, 2)
    bits = {info.name: info.bits for info in scheme.candidates}
    saved = sum(
        group.weights * (size - bits[name] / 8)
        for group, name in zip(scheme.groups, scheme.assignment, strict=True)
        if name is not None
    )
    return int(sum(entry.elements for entry in source.entries.values()) * size - saved) + _SLACK_BYTES


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.stop - entry.start for entry in checkpoint.entries.values())


def _scale_on_disk(name: str, on_disk: Mapping[str, str]) -> str:
    """``….k_proj.k_scale`` under the name of its projection in the checkpoint."""
    module, _, leaf = name.rpartition(".")
    return f"{on_disk[f'{module}.weight'].removesuffix('.weight')}.{leaf}"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, gone afterwards unless it was renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}); name another folder") from None
    try:
        os.chmod(folder, 0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
