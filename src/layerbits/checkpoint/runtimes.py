"""What vLLM makes of a label, as its source says; ``docs/export.md`` has what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from layerbits.checkpoint.label import MODELOPT, Label

VERSION = "0.32.0"
READS, REFUSES = "reads it", "refuses it"

_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")
"""``QUANT_ALGOS`` in ``vllm/model_executor/layers/quantization/modelopt.py`` among ours."""
ONLY_ALONE = ("FP8_PER_CHANNEL_PER_TOKEN",)
"""Labels of ours that ``ModelOptMixedPrecisionConfig.get_quant_method`` of vLLM 0.26.0 lacks; 0.32.0 has them."""

FOR_EXPERTS = ("FP8", "NVFP4", "W4A16_NVFP4")
"""Labels of ours that vLLM has for routed experts: it takes one scale for a tensor of an expert (``routed_experts.py``,
``_to_scalar``), alone and in a mix, 0.26.0 and 0.32.0."""
_PLAIN_HEADS = ("JambaForCausalLM", "OPTForCausalLM", "Qwen3NextForCausalLM")
"""Models whose head gets no quantization, in both versions (``models/jamba.py:426``, ``opt.py:355``,
``qwen3_next.py:810`` of 0.26.0)."""
_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")
"""Names that are 16 bits to vLLM in a checkpoint of one label (``modelopt.py:202`` of 0.26.0, ``:243`` of 0.32.0)."""


def vllm(label: Label) -> str:
    """Whether vLLM reads an export of that label, in words that start with :data:`READS` or :data:`REFUSES`.

    compressed-tensors: ``_get_scheme_from_parts`` and the schemes of
    ``vllm/model_executor/layers/quantization/compressed_tensors``.
    """
    if label.format == MODELOPT:
        return READS if label.algo in _MODELOPT else REFUSES
    weights, _, inputs = label.algo.partition("-")
    if weights.startswith("INT4"):
        return _int4(weights, inputs)
    if weights.startswith("INT8"):
        grouped = "GROUP" in weights
        served = not grouped and inputs in ("INT8_TOKEN", "INT8_TENSOR")
        return READS if served or (inputs == "A16" and weights != "INT8_TENSOR") else REFUSES
    if weights == "NVFP4":
        return READS if inputs in ("A16", "NVFP4") else REFUSES
    if label.algo in ("MXFP4-A16", "MXFP8-A16"):
        return f"{READS}; rounds the activations too on GPUs that have units for it"
    return READS


def reads(label: Label) -> bool:
    """Whether vLLM reads it somewhere."""
    return vllm(label).startswith(READS)


def only_alone(label: Label) -> bool:
    """Whether some vLLM refuses the label in a checkpoint that has other labels, too."""
    return label.format == MODELOPT and label.algo in ONLY_ALONE


def refused_modules(format: str, algos: Mapping[str, str], architecture: str = "", mixture: bool = False) -> list[str]:
    """What vLLM refuses of an export, or reads wrongly, for where a label is, a line each.

    Args:
        format: Of the export.
        algos: Name in memory of each quantized module → its label.
        architecture: Class of the model.
        mixture: Whether the model has routed experts, so that no other format has it.
    """
    lines, alone = [], set(algos.values()).intersection(ONLY_ALONE)
    if "lm_head" in algos and architecture in _PLAIN_HEADS:
        lines.append(f"vLLM has no quantized output head for {architecture}, and refuses its scales; leave it out")
    if format != MODELOPT:
        return lines
    if mixture and alone and len(set(algos.values())) > 1:
        lines.append(
            f"vLLM 0.26.0 takes linears under {', '.join(sorted(alone))} for unquantized beside other labels: it "
            "refuses them or, in Qwen3-MoE, computes with weights that lack their scales, without a word "
            "(models/qwen3_moe.py:529); use one label for all, or vLLM 0.32.0"
        )
    if module := next((m for m, algo in algos.items() if m.endswith(".experts") and algo not in FOR_EXPERTS), None):
        known = ", ".join(FOR_EXPERTS)
        lines.append(f"vLLM refuses routed experts under {algos[module]} ({module}); it reads them under {known}")
    if len(set(algos.values())) == 1 and (module := next((m for m in algos if any(t in m for t in _TOWERS)), None)):
        lines.append(
            f"vLLM takes {module} for 16 bits and refuses its scales, as of every {' and '.join(_TOWERS[:2])} in a "
            "checkpoint of one label in ModelOpt's format; use format=compressed-tensors"
        )
    return lines


def _int4(weights: str, inputs: str) -> str:
    if inputs == "A16":
        return READS
    if inputs == "FP8_TOKEN":
        return f"{READS} on Hopper" if weights == "INT4_GROUP128" else REFUSES
    return f"{READS} on CPUs" if inputs == "INT8_TOKEN" else REFUSES
