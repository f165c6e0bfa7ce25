"""Linears that stay quantized while others are scored: what a recipe has decided already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from layerbits.candidates.formats import plain
from layerbits.inputs.calibration import Batch
from layerbits.inputs.models import output_head
from layerbits.scoring import quantizers
from layerbits.scoring.kv_cache import KvCache
from layerbits.scoring.patches import forwards
from layerbits.scoring.replaced import ReplacedLinears


@contextmanager
def fixed_quantization(
    model: Any,
    configs: Mapping[str, Mapping[str, Any]],
    batches: Sequence[Batch],
    kv_cache: KvCache | None = None,
) -> Iterator[None]:
    """Quantizes linears, and keys and values, for a while, with ranges of the unquantized model.

    ModelOpt calibrates each format with every other group unquantized, and scores with the decided ones quantized; so
    do we.

    Args:
        model: The whole model, unquantized.
        configs: Full name of a linear → search config.
        batches: What the ranges are found on.
        kv_cache: Of the model.
    """
    with ExitStack() as stack:
        if kv_cache is not None:
            kv_cache.calibrate(batches)
        if configs:
            stack.enter_context(forwards(_quantized(model, configs, batches)))
        if kv_cache is not None:
            stack.enter_context(kv_cache.active())
        yield


def _quantized(model: Any, configs: Mapping[str, Mapping[str, Any]], batches: Sequence[Batch]) -> dict[Any, Any]:
    by_key = {json.dumps(plain(config), sort_keys=True): config for config in configs.values()}
    keys, names = list(by_key), list(configs)
    settings = quantizers.distinct_settings(list(by_key.values()))
    linears = ReplacedLinears(model, names, settings)
    linears.calibrate(batches, need_logits=output_head(model) in configs)
    linears.load_ranges(linears.ranges())
    candidates = {name: keys.index(json.dumps(plain(configs[name]), sort_keys=True)) for name in names}
    return linears.each_quantized(candidates)
