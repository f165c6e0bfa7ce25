"""A model made of a checkpoint: without numbers, or with all of its tensors and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.errors import UserError, first_line
from layerbits.inputs.architecture import is_remote, model_class, not_built
from layerbits.inputs.language_model import find_language_model
from layerbits.inputs.models import LoadedModel, ResolvedModel, build, scored_linears
from layerbits.inputs.offload import offload
from layerbits.inputs.quantized import check_dequantized, dequantizing
from layerbits.inputs.tensors import check_tensors
from layerbits.inputs.ties import check_loaded_ties, check_stored_ties
from layerbits.inputs.weights import check_weights, weight_files
from layerbits.libraries import short_bars_left_out
from layerbits.results.result import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def empty_model(resolved: ResolvedModel) -> PreTrainedModel:
    """A model without numbers, on torch's meta device.

    Raises:
        UserError: The tensors of the checkpoint are not those of the model; checked where safetensors are on this
            machine, whose headers tell.
    """
    local = Path(resolved.source)
    if resolved.spec.random_weights or not local.is_dir() or weight_files(local)[0].suffix != ".safetensors":
        with torch.device("meta"):
            return build(resolved.config, resolved.dtype)
    model = _from_checkpoint(resolved, {"": "meta"})
    check_stored_ties(model, local)
    return model


def load(
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    seed: int = 0,
    in_host_memory: bool = False,
) -> LoadedModel:
    """Loads the weights onto a device.

    Args:
        resolved: From :func:`layerbits.inputs.models.resolve`.
        tokenizer: From :func:`layerbits.inputs.models.load_tokenizer`.
        device: ``cpu`` or ``cuda``; with ``device_map`` the GPUs are chosen by accelerate.
        seed: For ``random_weights``.
        in_host_memory: Leaves the weights of the decoder blocks in host memory (:mod:`layerbits.inputs.offload`); the
            device never holds more than two blocks.

    Raises:
        UserError: The weights cannot be read.
        Unsupported: Its blocks cannot be streamed.
    """
    spec = resolved.spec
    if in_host_memory and spec.device_map:
        raise UserError(
            f"memory=offload keeps the weights in host memory and model.device_map={spec.device_map} spreads them over "
            "GPUs; leave one of them out"
        )
    target, device = device, "cpu" if in_host_memory else device
    dtype = resolved.dtype
    if spec.random_weights:
        torch.manual_seed(seed)
        with torch.device(device):
            model = build(resolved.config, dtype)
    else:
        try:
            model = _from_checkpoint(resolved, spec.device_map or (None if device == "cpu" else {"": device}))
        except torch.OutOfMemoryError:
            raise UserError(
                f"{spec.name} does not fit on {device}; free the GPU, or spread it with model.device_map=auto"
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
        language_model=find_language_model(model)[0],
    )
    return LoadedModel(model, tokenizer, info, scored_linears(model, spec))


def _from_checkpoint(resolved: ResolvedModel, device_map: str | dict[str, str] | None) -> PreTrainedModel:
    """Loads a model.

    Args:
        resolved: From :func:`layerbits.inputs.models.resolve`.
        device_map: As ``from_pretrained`` takes it; ``{"": "meta"}`` reads the headers alone.

    Raises:
        UserError: The weights cannot be read, are not those of the model, or are not dequantized as they should be.
        OutOfMemoryError: Of torch; they do not fit.
    """
    from safetensors import SafetensorError

    spec, source = resolved.spec, resolved.source
    dequantize = {} if resolved.quantization is None else {"quantization_config": dequantizing(resolved.quantization)}
    try:
        with _quiet(bar=device_map != {"": "meta"}):
            model, info = model_class(resolved.config).from_pretrained(
                source,
                revision=spec.revision,
                dtype=resolved.dtype,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error of ours, not drawn at random
                **({"trust_remote_code": True} if is_remote(resolved.config) else {}),
                **dequantize,
            )
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise UserError(f"{source} needs a package ({first_line(error)}); install it") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load the weights of {source} ({first_line(error)}); the checkpoint may be incomplete"
        ) from None
    except Exception as error:  # a model raises whatever a wrong value of its config makes of it
        raise not_built(resolved.config, source, error) from None
    check_tensors(info, source, resolved.config)
    if device_map != {"": "meta"}:
        _check_fetched(resolved)
        check_loaded_ties(model, source)
    if dequantize:
        check_dequantized(model, source)
    return model


def _check_fetched(resolved: ResolvedModel) -> None:
    """Checks the weight files of a model from the hub, which are on this machine once it is loaded.

    Raises:
        UserError: As :func:`layerbits.inputs.weights.check_weights`.
    """
    from transformers.utils import cached_file

    if not Path(resolved.source).is_dir():
        config = cached_file(resolved.source, "config.json", revision=resolved.spec.revision, local_files_only=True)
        folder = Path(config).parent
        check_weights(folder, weight_files(folder))


@contextmanager
def _quiet(bar: bool) -> Iterator[None]:
    """Hides what transformers prints of tensors that do not fit: it becomes one line of ours.

    Args:
        bar: Whether weights are loaded, so that its bar says what happens where that takes long.
    """
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bar:
        logging.disable_progress_bar()
    try:
        with short_bars_left_out():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
