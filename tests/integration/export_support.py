"""A tiny model on disk with a scheme for it, and the means to spoil its export; needs torch and ModelOpt, no MLflow."""

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from layerbits.export import scheme as export
from layerbits.export.plan import plan_export
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.probing.loading import Prepared

from .schemes_support import CALIBRATION, scheme_of
from .scoring_support import tiny_model

FILES = {"tokenizer_config.json": "{}", "preprocessor_config.json": '{"size": 1}', "LICENSE": "yes"}


def saved(kind, folder, dtype=torch.bfloat16, **changes):
    """A tiny model as a checkpoint folder with some of the files that come along."""
    model = tiny_model(kind, **changes).to(dtype)
    model.save_pretrained(folder)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return model


def prepared(model, folder, name="mine", **assigned):
    """A scheme on the model of a folder, ready to be planned."""
    resolved = resolve(ModelSpec("tiny", str(folder)))
    scheme = scheme_of(model, name, **assigned)
    dtype = str(model.dtype).removeprefix("torch.")
    scheme = replace(scheme, model=replace(scheme.model, revision=resolved.revision, dtype=dtype))
    return Prepared(scheme, resolved, None, None, CALIBRATION)


def planned(kind, folder, target=None, kv_cache="none", format="auto", dtype=torch.bfloat16, **assigned):
    """The plan of a tiny model's export."""
    source = folder / "source"
    ready = prepared(saved(kind, source, dtype), source, **assigned)
    ready = replace(ready, scheme=replace(ready.scheme, kv_cache=kv_cache))
    return plan_export(ready, target or folder / "exports" / "mine", format)


def spoil(monkeypatch, change):
    """Lets ``change`` alter the files between writing and proof: it gets the tensors and the quantization's config."""

    def spoiled(folder):
        own = folder / "hf_quant_config.json"
        file, config = folder / "model.safetensors", own if own.is_file() else folder / "config.json"
        tensors, labels = load_file(file), json.loads(config.read_text())
        change(tensors, labels)
        save_file(tensors, file, metadata={"format": "pt"})
        config.write_text(json.dumps(labels))

    spoil_files(monkeypatch, spoiled)


def spoil_files(monkeypatch, change):
    """As :func:`spoil`; ``change`` gets the folder that was written."""
    opened = export.open_checkpoint

    def spoiled(folder):
        monkeypatch.setattr(export, "open_checkpoint", opened)
        change(folder)
        return opened(folder)

    monkeypatch.setattr(export, "open_checkpoint", spoiled)
