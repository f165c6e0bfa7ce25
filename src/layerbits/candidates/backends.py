"""Block formats as ModelOpt's quantizers compute them without CUDA: our kernels, registered by name."""

from __future__ import annotations

import copy

from layerbits.candidates import fp4, mxfp8, nvfp4_static
from layerbits.candidates.linear import E4M3, E8M0, FP4, FP8, Cfg, Config

_BACKENDS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    (FP4, E8M0): fp4.MXFP4_BACKEND,
    (FP4, E4M3): fp4.NVFP4_BACKEND,
    (FP8, E8M0): mxfp8.MXFP8_BACKEND,
}
"""Backend by exponent and mantissa bits of the values and of the block scale."""
BACKENDS = frozenset(_BACKENDS.values())
"""Names under which ModelOpt's quantizers compute block formats here."""


def register_backends() -> None:
    """Makes ModelOpt's quantizers compute block formats without CUDA; a second call changes nothing."""
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )

    for name, entrypoint in (
        (fp4.MXFP4_BACKEND, fp4.mxfp4_entrypoint),
        (fp4.NVFP4_BACKEND, fp4.nvfp4_entrypoint),
        (mxfp8.MXFP8_BACKEND, mxfp8.entrypoint),
    ):
        if not is_registered_quant_backend(name):
            register_quant_backend(name, entrypoint)
    nvfp4_static.install()


def with_reference_backend(config: Config) -> Config:
    """Copies a ModelOpt quantization config with its FP4 and MXFP8 quantizers set to our backends.

    NVFP4 with stored block ranges names no backend: :func:`register_backends` sees to it.

    Args:
        config: ModelOpt config with an ordered ``quant_cfg`` list; left as it is.

    Returns:
        Deep copy in which every enabled quantizer of these has ``backend``; the rest is equal.
    """
    config = copy.deepcopy(config)
    for entry in config["quant_cfg"]:
        if not entry.get("enable", True):
            continue
        cfg = entry.get("cfg") or []
        for attributes in cfg if isinstance(cfg, list) else [cfg]:
            backend = _backend_of(attributes)
            if backend is not None:
                attributes["backend"] = backend
    return config


def _backend_of(attributes: Cfg) -> str | None:
    """Backend for one quantizer's attributes, ``None`` if it is no enabled block quantizer of ours."""
    blocks = attributes.get("block_sizes")
    if not attributes.get("enable", True) or not blocks or blocks.get("type") != "dynamic":
        return None
    return _BACKENDS.get((_bits(attributes.get("num_bits")), _bits(blocks.get("scale_bits"))))


def _bits(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()
