"""An export checked before anything heavy is loaded: its target, labels, source files and the space on the disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.checkpoint.files import KEPT
from layerbits.checkpoint.formats import choose_format
from layerbits.checkpoint.label import AUTO, COMPRESSED, FORMATS, MODELOPT, Label
from layerbits.checkpoint.labels import check_shape
from layerbits.checkpoint.reader import Checkpoint, open_checkpoint
from layerbits.errors import Unsupported, UserError
from layerbits.export.cache import check_cache
from layerbits.libraries import other_lines_to
from layerbits.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.models import ResolvedModel, Shapes
    from layerbits.probing.loading import Prepared
    from layerbits.schemes import Scheme

EXPERT_LABELS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")
"""Labels whose export is proven for experts; ``runtimes.FOR_EXPERTS`` has those that vLLM reads."""

_SLACK_BYTES = 64_000_000  # headers, tokenizer, scales of single rows
_ITEMSIZE = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class ExportPlan:
    """Everything that could be checked before the weights are loaded.

    Attributes:
        prepared: The scheme with its model and calibration rows.
        source: The checkpoint that was scored.
        format: ``modelopt`` or ``compressed-tensors``.
        labels: Candidate name → its label.
        target: Folder of the export; does not exist, or is empty.
        bytes: Estimated size of the export.
    """

    prepared: Prepared
    source: Checkpoint
    format: str
    labels: Mapping[str, Label]
    target: Path
    bytes: int

    @property
    def scheme(self) -> Scheme:
        """What is exported."""
        return self.prepared.scheme


def plan_exports(
    schemes: Sequence[Scheme], root: Path, format: str = AUTO
) -> tuple[list[ExportPlan], dict[str, UserError]]:
    """Checks the exports of some schemes of one model, each into a folder of its name below ``root``.

    Returns:
        The plans; and the names of the schemes that cannot be exported, with the reason.

    Raises:
        UserError: The schemes are of several models, or the disk is too small for all of them.
    """
    from layerbits.probing.loading import prepare_together

    prepared = prepare_together(schemes, "export")
    plans, refused = [], {}
    for scheme in schemes:
        try:
            plans.append(plan_export(replace(prepared, scheme=scheme), root / scheme.name, format))
        except UserError as error:
            refused[scheme.name] = error
    if plans:
        _check_space(plans[0].target, sum(plan.bytes for plan in plans), f"{len(plans)} schemes")
    return plans, refused


def plan_export(prepared: Prepared, target: Path, format: str = AUTO) -> ExportPlan:
    """Checks an export before anything heavy is loaded.

    Args:
        prepared: The scheme with its model and calibration rows; scales of its FP8 KV cache are stored as well.
        target: Folder of the export.
        format: ``modelopt``, ``compressed-tensors``, or ``auto``: the first that vLLM reads.

    Raises:
        UserError: The folder is not empty, the disk too small, or the source checkpoint cannot be read.
        Unsupported: A candidate whose label would not say what was scored, a weight that does not fit it, or a KV cache
            other than FP8.
    """
    from layerbits.inputs.experts import named_experts
    from layerbits.inputs.loading import empty_model
    from layerbits.inputs.models import scored_linears

    scheme = prepared.scheme
    if format not in (*FORMATS, AUTO):
        raise UserError(f"format={format} is not known; use {', '.join(FORMATS)} or {AUTO}")
    if scheme.kv_cache != NO_CACHE:
        if scheme.kv_cache != "fp8":
            raise Unsupported(
                f"scheme {scheme.name} has a KV cache of {scheme.kv_cache}, and checkpoints are proven with one of fp8 "
                "alone; use kv_cache=fp8 or none"
            )
        if format == COMPRESSED:
            raise UserError("kv_cache=fp8 is written by ModelOpt alone; use format=modelopt, or kv_cache=none")
        format = MODELOPT
    if not scheme.modules:
        raise UserError(f"scheme {scheme.name} quantizes nothing; give it fewer bits, or leave it out of schemes")
    target = user_path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; name another folder, or delete it")
    model = empty_model(prepared.resolved)
    linears = scored_linears(model, prepared.resolved.spec)
    experts = [module for module in scheme.modules if len(linears.get(module, ())) > 1]
    mixture = next(iter(named_experts(model)), None)
    if mixture is not None and format == COMPRESSED:
        raise Unsupported(f"{mixture} holds experts, which ModelOpt's format alone has; use format=modelopt")
    try:
        format, labels = choose_format(scheme.candidates, format if mixture is None else MODELOPT)
    except Unsupported as error:
        if mixture is not None:
            raise Unsupported(f"{error}; only ModelOpt's format has experts, which {mixture} holds") from None
        if scheme.kv_cache == NO_CACHE:
            raise
        raise Unsupported(
            f"{error}; only ModelOpt's format was tried, for the KV cache: kv_cache=none leaves it out"
        ) from None
    if scheme.kv_cache != NO_CACHE:
        check_cache(model)
    _check_modules(prepared, labels, model, linears)
    if format == MODELOPT:
        _check_convertible(model)
    for module in experts:
        label = labels[scheme.modules[module].name]
        if label.algo not in EXPERT_LABELS:
            raise Unsupported(
                f"{module} holds experts under {scheme.modules[module].name}, whose export as {label.algo} is not "
                f"proven for experts ({', '.join(EXPERT_LABELS)} are); leave it unquantized"
            )
    source = open_checkpoint(source_folder(prepared.resolved))
    plan = ExportPlan(prepared, source, format, labels, target, _estimate(scheme, source))
    _check_space(target, plan.bytes, scheme.name)
    return plan


def source_folder(resolved: ResolvedModel, download: bool = True) -> Path:
    """Folder with the files of a model; from the hub, tokenizer and processor files are fetched with it.

    Args:
        resolved: The model.
        download: Whether files of the hub that are not on this machine are fetched.

    Raises:
        UserError: The model has no files: its weights are random.
        LocalEntryNotFoundError: It is not on this machine, and is not to be fetched.
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
            allow_patterns=["*.safetensors", *KEPT],
            ignore_patterns=["consolidated*.safetensors"],  # Mistral's own layout of the same weights
            local_files_only=not download,
        )
    )


def _check_modules(
    prepared: Prepared, labels: Mapping[str, Label], model: PreTrainedModel, linears: Mapping[str, Shapes]
) -> None:
    from layerbits.inputs.linears import is_convolution, is_transposed

    for module, info in prepared.scheme.modules.items():
        if module not in linears:
            raise UserError(f"the model has no linear {module}; use the model that the scheme was made from")
        if is_transposed(model.get_submodule(module)):
            raise Unsupported(
                f"{module} is a Conv1D: its checkpoint has weights as [in, out], where no runtime looks for scales of "
                "quantized ones; probe and validate work, an export does not"
            )
        if is_convolution(model.get_submodule(module)):
            raise Unsupported(f"{module} is a convolution, which runtimes keep in 16 bits; leave it out of the scheme")
        for shape in linears[module]:
            check_shape(info, labels[info.name], module, *shape)


def _check_convertible(model: PreTrainedModel) -> None:
    """Whether ModelOpt, which writes the checkpoint, can put its quantizers into such a model."""
    from modelopt.torch.quantization.plugins.custom import register_custom_model_plugins_on_the_fly

    try:
        with other_lines_to(sys.stderr):
            register_custom_model_plugins_on_the_fly(model)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(
            f"ModelOpt cannot put its quantizers into a {type(model).__name__} ({type(error).__name__}: {error}); "
            "use format=compressed-tensors"
        ) from None


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


def _check_space(target: Path, size: int, what: str) -> None:
    existing = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"the export of {what} takes about {size / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free; free "
            "space or name another folder"
        )
