"""Formats of the KV cache: one range per tensor of keys or of values, as ModelOpt's ``[kv]_bmm_quantizer`` have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerbits.candidates.linear import E4M3, FP4, FP8

KV_FORMATS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"num_bits": FP8},
    "nvfp4": {
        "num_bits": FP4,
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3},
        "effective_bits": 4.5,
    },
}
"""Quantizer settings by name."""

QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")
