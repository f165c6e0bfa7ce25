"""What vLLM computes of a label on a generation of NVIDIA GPUs: as written, otherwise, or not at all.

vLLM chooses a kernel by the GPU's compute capability. Where there is no kernel that rounds the activations as the label
says, it takes one that leaves them in 16 bits, and the model that is served is not the one that was scored. One kernel
rounds the scales of the weights, and one computes as written with more rounding. Hopper was measured, kernels and
answers (``benchmarks/layouts_compare.py``); the others follow from vLLM's source, whose file and line is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from layerbits.checkpoint.label import MODELOPT
from layerbits.checkpoint.processors import MISSING, OTHERWISE, UNKNOWN, WRITTEN, Computed
from layerbits.checkpoint.runtimes import ONLY_ALONE

DATA = Path(__file__).parents[1] / "data" / "gpus.json"
VERSION = "0.26.0"
"""The vLLM that was measured and read."""

AMPERE, ADA, HOPPER, BLACKWELL = "Ampere", "Ada", "Hopper", "Blackwell"
GENERATIONS = (AMPERE, ADA, HOPPER, BLACKWELL)
TARGETS = {"a100": AMPERE, "a10": AMPERE, "l4": ADA, "l40s": ADA, "h100": HOPPER, "h200": HOPPER, "b200": BLACKWELL}
"""Names of GPUs, and their generation."""

LEFT = "vLLM leaves the activations in 16 bits"
FP8_SCALES = "vLLM rounds the scales of the groups to FP8"


@dataclass(frozen=True)
class Kernel:
    """What serves a label on a generation.

    Attributes:
        computed: What it computes.
        name: vLLM's class of the kernel; empty where there is none.
        source: Where that is known from: a measurement, or file and line of vLLM's source.
        rounding: What was measured of a kernel that computes as written and rounds more than PyTorch does.
    """

    computed: Computed
    name: str
    source: str
    rounding: str = ""


_LINEAR = "vllm/model_executor/kernels/linear"
_SCHEMES = "vllm/model_executor/layers/quantization"
_FP8 = ("FP8_TENSOR-FP8_*", "FP8_CHANNEL-FP8_*")
_OTHER_WEIGHTS = {"CutlassW4A8LinearKernel": (FP8_SCALES, f"{_LINEAR}/mixed_precision/cutlass.py:93")}
"""Kernels that change the weights when they are loaded: how, and where."""
_MIXED = Kernel(
    Computed(
        MISSING,
        "beside other labels it is read as unquantized; use one label, or format=compressed-tensors, which routed "
        "experts have no place in",
    ),
    "",
    f"measured on an H200, 2026-11-30, and {_SCHEMES}/modelopt.py:2526",
)
"""What serves ModelOpt's labels that a checkpoint of several labels may not have."""
PINNED = ("W4A16_NVFP4",)
"""Labels whose kernel vLLM does not choose, and does not name in its log (``modelopt.py:1283``)."""
_ROUNDS_MORE = {
    "HummingFP8ScaledMMLinearKernel": "it rounds more than PyTorch does: 33 and 43% more damage than the files have on "
    "Qwen2.5-Coder-0.5B, 9% on SmolLM2-135M"
}
"""Kernels that did more damage than the files have, beyond 10% and the runtime's noise (``docs/processors.md``)."""

_BY_SOURCE: tuple[tuple[tuple[str, ...], Mapping[str, tuple[str, str, str]]], ...] = (
    (
        ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"),
        {
            AMPERE: (MISSING, "", f"{_SCHEMES}/modelopt.py:413"),
            ADA: (WRITTEN, "CutlassFP8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:164"),
            BLACKWELL: (WRITTEN, "CutlassFP8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:164"),
        },
    ),
    (
        _FP8,
        {
            AMPERE: (
                LEFT,
                "HummingFP8ScaledMMLinearKernel",
                f"{_SCHEMES}/compressed_tensors/compressed_tensors.py:835",
            ),
            ADA: (WRITTEN, "CutlassFP8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:164"),
            BLACKWELL: (WRITTEN, "CutlassFP8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:164"),
        },
    ),
    (
        ("FP8_TENSOR-A16", "FP8_CHANNEL-A16"),
        dict.fromkeys(
            (AMPERE, ADA, BLACKWELL), (WRITTEN, "HummingFP8ScaledMMLinearKernel", f"{_LINEAR}/__init__.py:381")
        ),
    ),
    (
        ("INT8_CHANNEL-INT8_*", "INT8_TENSOR-INT8_*"),
        {
            AMPERE: (WRITTEN, "CutlassInt8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:35"),
            ADA: (WRITTEN, "CutlassInt8ScaledMMLinearKernel", f"{_LINEAR}/scaled_mm/cutlass.py:35"),
            BLACKWELL: (MISSING, "", "the words «Int8 not supported on SM» of vLLM's CUDA library"),
        },
    ),
    (
        ("NVFP4-NVFP4", "NVFP4"),
        {
            AMPERE: (LEFT, "MarlinNvFp4LinearKernel", f"{_LINEAR}/nvfp4/marlin.py:22"),
            ADA: (LEFT, "MarlinNvFp4LinearKernel", f"{_LINEAR}/nvfp4/marlin.py:22"),
            BLACKWELL: (WRITTEN, "CutlassNvFp4LinearKernel", f"{_LINEAR}/nvfp4/cutlass.py:24"),
        },
    ),
    (
        ("MXFP4-MXFP4",),
        {
            AMPERE: (LEFT, "MarlinMxFp4LinearKernel", f"{_LINEAR}/mxfp4/marlin.py:11"),
            ADA: (LEFT, "MarlinMxFp4LinearKernel", f"{_LINEAR}/mxfp4/marlin.py:11"),
            BLACKWELL: (WRITTEN, "FlashInferMxFp4LinearKernel", f"{_LINEAR}/mxfp4/flashinfer.py:22"),
        },
    ),
    (
        ("MXFP4-FP8_TOKEN",),
        {
            AMPERE: (LEFT, "MarlinMxFp4LinearKernel", f"{_SCHEMES}/compressed_tensors/compressed_tensors.py:745"),
            ADA: (LEFT, "MarlinMxFp4LinearKernel", f"{_SCHEMES}/compressed_tensors/compressed_tensors.py:745"),
        },
    ),
    (
        ("MXFP8-MXFP8",),
        {
            AMPERE: (LEFT, "MarlinMxfp8LinearKernel", f"{_LINEAR}/mxfp8/marlin.py:13"),
            ADA: (LEFT, "MarlinMxfp8LinearKernel", f"{_LINEAR}/mxfp8/marlin.py:13"),
            BLACKWELL: (WRITTEN, "FlashInferCutlassMxfp8LinearKernel", f"{_LINEAR}/mxfp8/flashinfer.py:23"),
        },
    ),
    (
        ("INT4_GROUP128-FP8_TOKEN",),
        {
            AMPERE: (MISSING, "", f"{_SCHEMES}/compressed_tensors/schemes/compressed_tensors_w4a8_fp8.py:71"),
            ADA: (MISSING, "", f"{_SCHEMES}/compressed_tensors/schemes/compressed_tensors_w4a8_fp8.py:71"),
            BLACKWELL: (MISSING, "", f"{_LINEAR}/mixed_precision/cutlass.py:36"),
        },
    ),
    (
        ("INT4_*-A16", "INT8_GROUP*-A16", "INT8_CHANNEL-A16"),
        dict.fromkeys(
            (AMPERE, ADA, BLACKWELL), (WRITTEN, "MarlinLinearKernel", f"{_LINEAR}/mixed_precision/marlin.py:36")
        ),
    ),
    (
        ("NVFP4-A16", "W4A16_NVFP4"),
        dict.fromkeys((AMPERE, ADA, BLACKWELL), (WRITTEN, "MarlinNvFp4LinearKernel", f"{_LINEAR}/nvfp4/marlin.py:22")),
    ),
    (
        ("MXFP4-A16",),
        dict.fromkeys((AMPERE, ADA), (WRITTEN, "MarlinMxFp4LinearKernel", f"{_LINEAR}/mxfp4/marlin.py:11")),
    ),
)


def kernel(format: str, algo: str, generation: str, version: str = VERSION, mixed: bool = False) -> Kernel:
    """What vLLM serves the linears with a label by.

    Args:
        format: ``modelopt`` or ``compressed-tensors``.
        algo: The label.
        generation: One of :data:`GENERATIONS`.
        version: Of vLLM; another than the one that was measured is not known.
        mixed: Whether the checkpoint has other labels, too.
    """
    if version != VERSION:
        return Kernel(Computed(UNKNOWN, f"only vLLM {VERSION} was measured and read, not {version}"), "", "")
    if mixed and format == MODELOPT and algo in ONLY_ALONE:
        return _MIXED
    if generation == HOPPER:
        return _measured().get((format, algo), Kernel(Computed(UNKNOWN, "it was not asked"), "", ""))
    for patterns, answers in _BY_SOURCE:
        if generation in answers and any(fnmatchcase(algo, pattern) for pattern in patterns):
            state, name, source = answers[generation]
            how = Computed(OTHERWISE, LEFT) if state == LEFT else Computed(state)
            return Kernel(how, name, source)
    return Kernel(Computed(UNKNOWN, "not read from vLLM's source"), "", "")


def generation(capability: tuple[int, int]) -> str | None:
    """The generation of a GPU by its compute capability; ``None`` = none of :data:`GENERATIONS`."""
    major, minor = capability
    if major == 8:
        return ADA if minor == 9 else AMPERE
    return {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL, 12: BLACKWELL}.get(major)


@cache
def _measured() -> dict[tuple[str, str], Kernel]:
    """What the record of an H200 says, by format and label."""
    record = json.loads(DATA.read_text("utf-8"))
    source = f"measured on an {record['machine'].removeprefix('NVIDIA ')}, {record['date']}"
    kernels = {}
    for row in record["layouts"]:
        if row["loads"]:
            how = Computed(WRITTEN) if row["computed"] == WRITTEN else Computed(OTHERWISE, LEFT)
            name, known = ", ".join(row["kernels"]), source
            if name in _OTHER_WEIGHTS:
                other, where = _OTHER_WEIGHTS[name]
                how, known = Computed(OTHERWISE, other), f"{source}, and {where}"
        else:
            how, name, known = Computed(MISSING, row["words"]), "", source
        kernels[row["format"], row["label"]] = Kernel(how, name, known, _ROUNDS_MORE.get(name, ""))
    return kernels
