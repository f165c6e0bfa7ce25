"""A model's processor for still pictures: its image processor, tokenizer and chat template, without what videos need.

``AutoProcessor`` also loads the processor of videos, which needs torchvision. Pictures need Pillow alone, and Pillow's
backend gives the same pixels on every machine; so the processor's own class is made with those parts only.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError, first_line
from layerbits.inputs.architecture import check_tokenizer_code, is_remote
from layerbits.inputs.captions import CaptionSet
from layerbits.inputs.datasets import has_pictures
from layerbits.inputs.folder import check_processor
from layerbits.inputs.models import ResolvedModel
from layerbits.inputs.picture_rows import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_PARTS = ("image_processor", "tokenizer")
_LACKING = (
    re.compile(r"Missing optional dependencies: ([\w, -]+)"),
    re.compile(r"requires the (.+?) library but it was not found"),
    re.compile(r"requires the following packages that were not found in your environment: ([\w, -]+)"),
    re.compile(r"Package `([\w-]+)` is required"),
    re.compile(r"No module named '(\w+)"),
)
"""How transformers, and Python, say that a package is missing."""


def reader_for(
    captions: CaptionSet,
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
    min_pixels: int | None,
    max_pixels: int | None,
) -> Reader | None:
    """How the pictures of a dataset become tokens of a model; ``None`` where it has none.

    Raises:
        UserError: As :func:`load_processor` and :meth:`Reader.of`.
    """
    if not has_pictures(captions.captions):
        return None
    processor = load_processor(resolved, tokenizer)
    return Reader.of(processor, resolved.config, min_pixels, max_pixels, resolved.spec.vision)


def load_processor(resolved: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a vision-language model.

    Args:
        resolved: The model.
        tokenizer: From :func:`layerbits.inputs.models.load_tokenizer`.

    Raises:
        UserError: The model only reads text, its folder has no processor, or the processor cannot be made here.
    """
    spec, source = resolved.spec, resolved.source
    if getattr(resolved.config, "vision_config", None) is None:
        raise UserError(
            f"{spec.name} ({resolved.config.model_type}) reads text alone; use dataset=everyday, or choose a "
            "vision-language model"
        )
    folder = Path(source)
    if folder.is_dir():
        check_processor(folder)
    check_tokenizer_code(source, spec.trust_remote_code)
    try:
        return _processor(resolved, tokenizer)
    except UserError:
        raise
    except Exception as error:  # the readers of processor files raise whatever a damaged one makes of them
        if lacking := missing_packages(error):  # transformers has a ValueError for that, too
            raise UserError(
                f"the processor of {source} needs {' and '.join(lacking)}, not installed here; add it with pip"
            ) from None
        raise UserError(
            f"{source} holds no processor that can be read ({first_line(error)}); put the processor files of the model "
            "into the checkpoint"
        ) from None


def missing_packages(error: Exception) -> list[str]:
    """Names of the packages for which an error says that they are missing; empty where it is about something else."""
    said = [name for pattern in _LACKING for found in pattern.findall(str(error)) for name in found.split(", ")]
    return list(dict.fromkeys(name.lower() for name in said))


def _processor(resolved: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    from transformers import AutoProcessor
    from transformers.models.auto.image_processing_auto import (
        AutoImageProcessor,  # the public name asks for torchvision
    )

    options = {"revision": resolved.spec.revision, "trust_remote_code": resolved.spec.trust_remote_code}
    if is_remote(resolved.config):
        return AutoProcessor.from_pretrained(resolved.source, **options)
    kind = _class(resolved, tokenizer)
    said, _ = kind.get_processor_dict(resolved.source, revision=resolved.spec.revision)
    images = AutoImageProcessor.from_pretrained(resolved.source, backend="pil", **options)
    made: dict[str, object] = {"image_processor": images, "tokenizer": tokenizer}
    names = [n for n in list(inspect.signature(kind.__init__).parameters)[1:] if n in kind.get_attributes()]
    if "image_processor" not in names:
        raise UserError(f"the processor of {resolved.source} ({kind.__name__}) takes no pictures; give another model")

    return still_class(kind).from_args_and_dict([made.get(name) for name in names], said)


def still_class(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor's class whose other parts (videos, sounds) may be missing, under its own name."""
    parts = [name for name in kind.get_attributes() if name in _PARTS]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _class: list(parts))})


def _class(resolved: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> type[ProcessorMixin]:
    """The processor's class: as its files say, else that of the model's type."""
    import transformers
    from transformers import ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    said, _ = ProcessorMixin.get_processor_dict(resolved.source, revision=resolved.spec.revision)
    names = (
        said.get("processor_class"),
        getattr(tokenizer, "init_kwargs", {}).get("processor_class"),
        PROCESSOR_MAPPING_NAMES.get(resolved.config.model_type),
    )
    for name in filter(None, names):
        kind = getattr(transformers, str(name), None)
        if kind is not None and getattr(kind, "is_dummy", False):
            kind = _without_backends(str(name)) or kind
        if kind is not None:
            return kind
    raise UserError(
        f"transformers has no processor for {resolved.config.model_type}; choose another vision-language model"
    )


def _without_backends(name: str) -> type[ProcessorMixin] | None:
    """A processor's class where transformers withholds it for a package that pictures do not need."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = next((kind for kind, processor in PROCESSOR_MAPPING_NAMES.items() if processor == name), None)
    try:
        module = importlib.import_module(f"transformers.models.{kind}.processing_{kind}")
    except ImportError:
        return None
    return getattr(module, name, None)
