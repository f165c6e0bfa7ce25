"""The KV cache of schemes: a toggle beside the assignment, with a price and no part in any budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.errors import UserError
from layerbits.results.assignment import UNQUANTIZED_BITS, Assignment
from layerbits.schemes.scheme import Scheme

AUTO = "auto"
ALONE = "kv_cache"
"""The method of a scheme that quantizes keys and values alone."""


def kv_choice(given: object) -> str:
    """The ``kv_cache`` of a configuration: :data:`AUTO`, ``none`` or a format.

    Raises:
        UserError: It is none of them.
    """
    choices = (AUTO, NO_CACHE, *KV_FORMATS)
    name = NO_CACHE if given in (None, "") else str(given)
    if name not in choices:
        raise UserError(f"kv_cache={given} is not known; use one of {', '.join(choices)}")
    return name


def chosen_cache(wanted: str, priced: Mapping[str, float]) -> str:
    """What a scheme does to keys and values: what is asked for, by default the one format that its runs priced."""
    if wanted != AUTO:
        return wanted
    return next(iter(priced)) if len(priced) == 1 else NO_CACHE


def with_cache(scheme: Scheme, wanted: str) -> Scheme:
    """A scheme with another KV cache; :data:`AUTO` = as it is."""
    return scheme if wanted == AUTO else replace(scheme, kv_cache=wanted)


def toggles(schemes: Sequence[Scheme]) -> list[Scheme]:
    """The KV caches of some schemes as schemes of their own, which leave every linear as it is: ``kv_<format>``."""
    by_cache: dict[str, Scheme] = {}
    for scheme in schemes:
        if scheme.kv_cache != NO_CACHE and scheme.kv_cache not in by_cache:
            by_cache[scheme.kv_cache] = replace(
                scheme,
                name=f"kv_{scheme.kv_cache}",
                candidates=(),
                assignment=Assignment([None] * len(scheme.groups)),
                effective_bits=UNQUANTIZED_BITS,
                effective_bits_active=UNQUANTIZED_BITS,
                effective_bits_modelopt=UNQUANTIZED_BITS,
                predicted_kl=0.0,
                score=0.0,
                how={"method": ALONE},
                notes=(),
            )
    return list(by_cache.values())
