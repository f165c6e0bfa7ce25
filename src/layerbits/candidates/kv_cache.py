"""Formats of the KV cache: one range per tensor of keys or of values, as ModelOpt's ``[kv]_bmm_quantizer`` have it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from layerbits.candidates.linear import E4M3, FP4, FP8, Cfg
from layerbits.errors import UserError

NO_CACHE = "none"
"""What stands for keys and values as they are."""

_FP8: Cfg = {"num_bits": FP8}
_NVFP4: Cfg = {
    "num_bits": FP4,
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3},
    "effective_bits": 4.5,
}
_CAST: Cfg = {"use_constant_amax": True}

KV_FORMATS: Mapping[str, Cfg] = {
    "fp8": _FP8,
    "nvfp4": _NVFP4,
    "fp8_cast": {**_FP8, **_CAST},
    "nvfp4_cast": {**_NVFP4, **_CAST},
}
"""Quantizer settings by the name of ModelOpt's preset; ``_cast`` has a constant for the range."""

QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")


def kv_formats(given: object, key: str = "kv_cache") -> tuple[str, ...]:
    """Formats of a configuration: a list, or names joined by ``+``; ``none`` is no format.

    Raises:
        UserError: One of them is not known.
    """
    names = tuple(given) if isinstance(given, list | tuple) else tuple(filter(None, str(given or NO_CACHE).split("+")))
    if names in ((), (NO_CACHE,)):
        return ()
    for name in names:
        if name not in KV_FORMATS:
            raise UserError(f"{key}={name} is not known; use one of {', '.join(KV_FORMATS)}, several joined by +")
    return tuple(dict.fromkeys(names))


def kv_name(settings: Mapping[str, object] | None) -> str | None:
    """The name of some quantizer settings, ``None`` where they are none of :data:`KV_FORMATS`."""
    if settings is None:
        return NO_CACHE
    said = _computed(settings)
    return next((name for name, known in KV_FORMATS.items() if _computed(known) == said), None)


def _computed(settings: Mapping[str, object]) -> object:
    """The settings that change a value, in JSON's types."""
    return json.loads(json.dumps({key: value for key, value in settings.items() if key != "effective_bits"}))
