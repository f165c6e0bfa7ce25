"""What a candidate stores and computes in: bits per weight and the words for precisions."""

from __future__ import annotations

import math

from layerbits.candidates.linear import E8M0, WEIGHT, Cfg, LinearConfig, Setting, block_lengths
from layerbits.errors import UserError

SCALE_BITS = 16
"""Bits of a block scale that the configuration does not quantize: runtimes store it as fp16 or bf16."""


def weight_bits(linear: LinearConfig) -> float:
    """Storage bits per weight: value bits plus block scales, from the weight quantizer alone.

    MXFP4 4 + 8/32 = 4.25, NVFP4 4 + 8/16 = 4.5, INT4 in groups of 128 with fp16 scales 4 + 16/128 = 4.125. Scales per
    tensor and per channel are not counted: 16 bits for a row of 576 weights are 0.028 bit, less for wider ones. A
    sequential quantizer (INT4, then FP8 for the matmul) stores its narrowest stage.

    Raises:
        UserError: ``num_bits`` is a word of a custom backend.
    """
    return min(_storage_bits(stage) for stage in linear.stages_of(WEIGHT))


def modelopt_bits(linear: LinearConfig) -> float:
    """ModelOpt's own figure: the minimum of ``num_bits`` (or its per-quantizer override) over weights and inputs."""
    from modelopt.torch.quantization.algorithms import estimate_quant_compression
    from modelopt.torch.quantization.config import QuantizeConfig

    entries = [{"quantizer_name": f"*{q}", "cfg": cfg} for q, cfg in linear.cfgs.items() if cfg is not None]
    return 16 * float(estimate_quant_compression(QuantizeConfig(quant_cfg=entries)))


def precision(cfg: Setting) -> str:
    """Precision word of a quantizer: ``fp4``, ``fp8``, ``int8``, …, or ``fp16`` where it is disabled."""
    if cfg is None:
        return "fp16"
    bits = (cfg[0] if isinstance(cfg, list) else cfg).get("num_bits", 8)
    if isinstance(bits, str):
        return bits
    return f"fp{sum(bits) + 1}" if isinstance(bits, tuple) else f"int{bits}"


def _storage_bits(cfg: Cfg) -> float:
    bits = cfg.get("num_bits", 8)
    if isinstance(bits, str):
        raise UserError(
            f"num_bits {bits!r} does not tell the storage bits; give a number of bits or (exponent, mantissa)"
        )
    value = sum(bits) + 1 if isinstance(bits, tuple) else bits
    lengths = block_lengths(cfg).values()
    if not lengths or None in lengths:
        return float(value)
    scale = (cfg.get("block_sizes") or {}).get("scale_bits") or SCALE_BITS
    if isinstance(scale, tuple):
        scale = 8 if scale == E8M0 else sum(scale) + 1  # E8M0 has no sign bit
    return float(value + int(scale) / math.prod(n for n in lengths if n))
