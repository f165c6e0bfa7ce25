"""ModelOpt's exporter, given exactly the quantizers that were scored.

ModelOpt 0.47 quantizes once more when it writes, with arithmetic of its own: it divides bf16 weights by their scale in
bf16 (2.5% of the FP8 values of a random tensor came out a step off) and rounds ties to MXFP4 down where its kernels
round to even. So weights are written from their fake-quantized values, which a second rounding leaves where they are.
Linears that runtimes fuse are fake-quantized at the range that they share, where those have one scale for them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerbits.checkpoint import config_file, modelopt
from layerbits.checkpoint.compare import fake_quantized
from layerbits.checkpoint.expert_names import expert_module
from layerbits.checkpoint.experts import ExpertLinear
from layerbits.checkpoint.files import copy_files
from layerbits.checkpoint.reader import Checkpoint
from layerbits.checkpoint.scored import ScoredLayer
from layerbits.checkpoint.shards import add_shards
from layerbits.errors import UserError
from layerbits.inputs.names import names_on_disk
from layerbits.inputs.prediction_layers import prediction_module, prediction_modules
from layerbits.libraries import other_lines_to, short_bars_left_out
from layerbits.plain import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerbits.inputs.calibration import Batch
    from layerbits.schemes import Scheme

_MARK = re.compile(r"\.\\u0000[\w.]*name_sentinel")
"""The mark in JSON, renamed or not."""


def write_checkpoint(
    model: PreTrainedModel,
    scheme: Scheme,
    layers: Sequence[ScoredLayer],
    folder: Path,
    source: Checkpoint,
    kv_batches: Sequence[Batch],
    language_model: str,
) -> dict[str, torch.Tensor]:
    """Quantizes a loaded model and exports it; the model is of no use afterwards.

    Args:
        model: The whole model, unquantized.
        scheme: What is exported.
        layers: Its linears, from :func:`layerbits.checkpoint.scored.scored_layers`.
        folder: Where to; exists.
        source: The checkpoint that was scored, for tokenizer, processor and licence files and multi-token prediction.
        kv_batches: Batches to calibrate an FP8 KV cache on; none = the cache stays in the model's dtype.
        language_model: Name of the language model's module; attention elsewhere keeps no cache.

    Returns:
        Name of each scale of the KV cache, as in memory → calibrated range.
    """
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import GenerationConfig

    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    if model.can_generate():  # transformers refuses to save some that it loads; the source's file is copied below
        model.generation_config = GenerationConfig()
    ahead = [f"{module}.*" for module in prediction_modules(source.entries, model.config)]
    misnamed = _misnamed(model)
    with other_lines_to(sys.stderr), short_bars_left_out():
        _quantize(model, scheme, layers)
        kv_ranges = _quantize_kv_cache(model, kv_batches, language_model) if kv_batches else {}
        export_hf_checkpoint(model, export_dir=folder)
    add_shards(((n, source.rows(n)) for n in source.entries if prediction_module(n, model.config) is not None), folder)
    for file in folder.glob("generation_config.json"):
        file.unlink()
    copy_files(source.folder, folder)
    _write_config(source, folder, model, misnamed, ahead, layers)
    return kv_ranges


def _quantize(model: PreTrainedModel, scheme: Scheme, layers: Sequence[ScoredLayer]) -> None:
    import modelopt.torch.quantization as mtq

    from layerbits.candidates.runtime import runtime_config

    entries: list[JsonObject] = [{"quantizer_name": "*", "enable": False}]
    experts = {layer.expert.module for layer in layers if layer.expert is not None}
    for name, info in scheme.modules.items():
        config = runtime_config(info, next(model.get_submodule(name).parameters()).device)
        # The quantizers of an expert module have the names of its projections before theirs.
        between = "*" if name in experts else ""
        entries += [
            {"quantizer_name": f"{name}.{between}{entry['quantizer_name'].lstrip('*')}", "cfg": entry["cfg"]}
            for entry in config["quant_cfg"]
            if "cfg" in entry
        ]
    for name in scheme.modules:
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear  # ModelOpt's exporter passes over Falcon's own class of linears
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    _quantize_experts(model, layers)
    for layer in layers:
        if layer.expert is not None:
            continue
        module = model.get_submodule(layer.module)
        if layer.stored_range is not None:
            module.weight_quantizer.amax = layer.stored_range.float() * layer.label.kernel_factor
        if layer.input_range is not None:
            module.input_quantizer.amax = layer.input_range
        with torch.no_grad():
            module.weight.copy_(module.weight_quantizer(module.weight))
        if layer.stored_range is not None:
            module.weight_quantizer.amax = layer.stored_range
        if layer.label.algo == "W4A16_AWQ":
            # The label promises a smoothing of the inputs, and runtimes read it; none was scored.
            module.input_quantizer.pre_quant_scale = torch.ones_like(module.weight[0])


def _quantize_experts(model: PreTrainedModel, layers: Sequence[ScoredLayer]) -> None:
    """Gives the experts' quantizers their ranges, and the experts their fake-quantized weights."""
    for layer in layers:
        if (expert := layer.expert) is None:
            continue
        module = model.get_submodule(expert.module)
        quantizer = getattr(module, f"{expert.projection}_weight_quantizers")[expert.expert]
        inputs = getattr(module, f"{expert.projection}_input_quantizer")
        if layer.input_range is not None:
            inputs.amax = layer.input_range
        weight = expert.rows(getattr(module, expert.projection))
        with torch.no_grad():
            weight.copy_(fake_quantized(layer, weight, layer.stored_range, len(weight), 0, len(weight)))
        if layer.stored_range is None:
            continue
        if layer.stored_range.numel() == 1:
            quantizer.amax = layer.stored_range
        elif expert.start == 0:  # ranges of rows: those of all rows of this tensor, in order
            parts = [o.stored_range for o in layers if _same_tensor(o.expert, expert)]
            quantizer.amax = torch.cat([part for part in parts if part is not None])


def _same_tensor(one: ExpertLinear | None, other: ExpertLinear) -> bool:
    return one is not None and replace(other, start=one.start, stop=one.stop, name=one.name, source=one.source) == one


def _quantize_kv_cache(
    model: PreTrainedModel, batches: Sequence[Batch], language_model: str
) -> dict[str, torch.Tensor]:
    """FP8 quantizers on keys and values, their ranges found with the linears quantized."""
    import modelopt.torch.quantization as mtq

    from layerbits.progress import progress
    from layerbits.scoring.steps import calibration_forward

    prefix = f"{language_model}." if language_model else ""
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and name.endswith((".k_bmm_quantizer", ".v_bmm_quantizer"))
    }
    if not quantizers:
        raise UserError(f"ModelOpt finds no attention of {type(model).__name__} to quantize; use kv_cache=none")
    entry = mtq.FP8_KV_CFG["quant_cfg"][0]
    mtq.set_quantizer_by_cfg(model, [{**entry, "quantizer_name": name} for name in quantizers])
    for quantizer in quantizers.values():
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in progress(batches, "calibrating the KV cache"):
            calibration_forward(model, batch, need_logits=False)
    ranges = {}
    for name, quantizer in quantizers.items():
        quantizer.disable_calib()
        if quantizer._calibrator.compute_amax() is None:  # a linear attention keeps no keys and values
            quantizer.disable()
            continue
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        attention, _, leaf = name.rpartition(".")
        ranges[f"{attention}.{leaf[0]}_proj.{leaf[0]}_scale"] = quantizer.amax.detach().clone()
    return ranges


def _misnamed(model: PreTrainedModel) -> dict[str, str]:
    """What ModelOpt calls a module in the configuration → what its weight is called in the files, where they differ.

    ModelOpt renames modules, transformers renames weights (Nemotron-H: ``embedding.weight`` for ``embeddings.weight``).
    """
    from modelopt.torch.export import quant_aware_conversion

    try:
        renamed = quant_aware_conversion.build_reverse_name_mapper(model)
    except quant_aware_conversion.QuantConversionUnsupportedError:  # it keeps the names of the model then
        return {}
    if renamed is None:
        return {}
    files = {
        name.removesuffix(".weight"): stored.removesuffix(".weight")
        for name, stored in names_on_disk(model).items()
        if name.endswith(".weight")
    }
    said = {name: str(renamed(name)).partition(".\x00")[0] for name in files}
    return {said[name]: stored for name, stored in files.items() if said[name] != stored}


def _write_config(
    source: Checkpoint,
    folder: Path,
    model: PreTrainedModel,
    misnamed: Mapping[str, str],
    ahead: Sequence[str],
    layers: Sequence[ScoredLayer],
) -> None:
    """The source's configuration with ModelOpt's quantization, by the names of the files.

    ModelOpt 0.47 marks the end of a name before it renames it, and where a renaming is written without an anchor (the
    ``model.`` of Nemotron-H) it takes the mark for a part of the name. It has one name for all experts of a module,
    where the files have a linear for each.

    Args:
        source: The checkpoint that was scored.
        folder: The export.
        model: The whole model.
        misnamed: From :func:`_misnamed`.
        ahead: Patterns of the layers for multi-token prediction, which are in the export as they were.
        layers: The quantized linears.
    """
    made = []
    for file in (folder / config_file.FILE, folder / modelopt.FILE):
        text = _MARK.sub("", file.read_text("utf-8"))
        for wrong, right in misnamed.items():
            text = text.replace(f'"{wrong}"', f'"{right}"')
        made.append(json.loads(text))
    quantization, details = made[0]["quantization_config"], made[1]
    linears = _expert_names(layers)
    for said, key in ((quantization, "ignore"), (details["quantization"], "exclude_modules")):
        _name_experts(said, linears)
        patterns = [*(said.get(key) or ()), *ahead]
        patterns += _experts_left_alone(source, layers, patterns)
        if patterns:
            said[key] = patterns
    (folder / modelopt.FILE).write_text(json.dumps(details, indent=4) + "\n", "utf-8")
    dtype = str(model.dtype).removeprefix("torch.")
    config_file.write_config(source.folder, folder, quantization, dtype, type(model).__name__)


def _expert_names(layers: Sequence[ScoredLayer]) -> dict[str, list[str]]:
    """Names in the files of the linears of each expert module, by both names of the module."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        if layer.expert is not None:
            for module in dict.fromkeys((layer.expert.module, expert_module(layer.exported))):
                names.setdefault(module, []).append(layer.exported)
    return names


def _name_experts(said: JsonObject, linears: Mapping[str, Sequence[str]]) -> None:
    """Puts the linears of the files in the place of expert modules, where layers are listed with their labels."""
    if said.get("quantized_layers"):
        listed = said["quantized_layers"].items()
        said["quantized_layers"] = {n: layer for name, layer in listed for n in linears.get(name, [name])}
        for group in (said.get("config_groups") or {}).values():
            group["targets"] = [n for name in group["targets"] for n in linears.get(name, [name])]


def _experts_left_alone(source: Checkpoint, layers: Sequence[ScoredLayer], patterns: Sequence[str]) -> list[str]:
    """Patterns of the routed experts that are not quantized and that no pattern excludes yet.

    vLLM takes routed experts that are not excluded for what it finds beside them: the expert that every token takes.
    """
    quantized = {expert_module(layer.stored) for layer in layers}
    modules = {expert_module(name): name for name in source.entries}
    return [
        f"{module}*"
        for module, name in modules.items()
        if module and module not in quantized and not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
