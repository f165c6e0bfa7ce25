"""The weights of a checkpoint as a model: all of its tensors and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerbits.errors import UserError
from layerbits.inputs.architecture import is_remote, model_class
from layerbits.inputs.quantized import check_dequantized, dequantizing
from layerbits.inputs.tensors import check_tensors

if TYPE_CHECKING:
    from layerbits.inputs.models import ResolvedModel


def from_checkpoint(resolved: ResolvedModel, device_map: Any) -> Any:
    """Loads a model.

    Args:
        resolved: From :func:`layerbits.inputs.models.resolve`.
        device_map: As ``from_pretrained`` takes it; ``{"": "meta"}`` reads the headers alone.

    Raises:
        UserError: The weights cannot be read, are not those of the model, or are not dequantized as they should be.
        OutOfMemoryError: Of torch; they do not fit.
    """
    import torch
    from safetensors import SafetensorError

    spec, source = resolved.spec, resolved.source
    dequantize = {} if resolved.quantization is None else {"quantization_config": dequantizing(resolved.quantization)}
    try:
        with _quiet(bar=device_map != {"": "meta"}):
            model, info = model_class(resolved.config).from_pretrained(
                source,
                revision=spec.revision,
                dtype=dtype_of(spec.dtype, resolved.config),
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told of, not to be drawn anew
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
    check_tensors(info, source)
    if dequantize:
        check_dequantized(model, source)
    return model


def dtype_of(name: str, config: Any) -> Any:
    """The dtype of ``model.dtype``; with ``auto`` the checkpoint's own."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    text = getattr(config, "text_config", config)
    return getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet(bar: bool) -> Iterator[None]:
    """Hides what transformers prints of tensors that do not fit: it becomes one line of ours.

    Args:
        bar: Whether weights are loaded, so that its bar says what happens.
    """
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
