"""A candidate's ModelOpt configuration as it is computed on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerbits.candidates import backends, fp4
from layerbits.candidates.formats import Format, normalise, plain
from layerbits.candidates.granularity import TOKEN_GROUP_BACKEND, register_backend
from layerbits.plain import JsonObject
from layerbits.results.result import CandidateInfo

if TYPE_CHECKING:
    import torch


def runtime_config(info: CandidateInfo, device: torch.device) -> JsonObject:
    """A candidate's ModelOpt config with bare quantizer names, as it is computed on a device.

    FP4 uses our backend where ModelOpt's kernels cannot run; token groups always use ours.
    """
    config = Format(info.format_name, normalise(info.config)).bare()
    if TOKEN_GROUP_BACKEND in str(plain(config)):
        register_backend()
    return computed_by(config, device.type == "cuda" and fp4.cuda_kernels_available())


def computed_by(config: JsonObject, kernels: bool) -> JsonObject:
    """A ModelOpt config as it is computed with ModelOpt's CUDA kernels for FP4 and MXFP8, or by our backends."""
    if kernels:
        return config
    backends.register_backends()
    return backends.with_reference_backend(config)
