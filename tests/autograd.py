"""Gradient scores by plain autograd: no checkpointing, no taps, nothing let go."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from layerbits.inputs.calibration import Batch, Segment
from layerbits.scoring.job import ScoringJob
from layerbits.scoring.search import Search
from layerbits.scoring.taps import Taps


def autograd_scores(job: ScoringJob) -> list[float]:
    """``Σ (g · (y_c − y))²`` of each group, for the first candidate of a job.

    The outputs ``y_c`` come from the quantizers of the library, whose numbers are compared with ModelOpt's elsewhere;
    the gradients ``g``, the outputs ``y`` and the sum do not.
    """
    model = job.loaded.model
    search = Search.of(job)
    taps = Taps(model, search.names, search.settings)
    taps.calibrate(job.calibration.calib, search.need_logits)
    taps.load_ranges(taps.ranges())
    quantized = {tap.name: tap.quantized(search.settings.pairs[0]) for tap in taps.taps}
    by_module = _scores(model, quantized, job.calibration.score)
    return [sum(by_module[name] for name in group.modules) for group in search.groups]


def _scores(model: Any, quantized: Mapping[str, Any], batches: Sequence[Batch]) -> dict[str, float]:
    found = dict.fromkeys(quantized, 0.0)
    for batch in batches:
        for segment in batch.segments:
            calls: dict[str, list[dict[str, Any]]] = {name: [] for name in quantized}
            handles = [
                model.get_submodule(name).register_forward_hook(partial(_record, calls[name]), with_kwargs=True)
                for name in quantized
            ]
            (_loss(model, segment) / batch.loss_tokens).backward()
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, function in quantized.items():
                    for call in calls[name]:
                        change = function(*call["inputs"]).double() - call["output"].double()
                        found[name] += float(((call["gradient"].double() * change) ** 2).sum())
    model.zero_grad()
    return found


def _record(calls: list[dict[str, Any]], _module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
    call = {"inputs": [t.detach().clone() for t in (*args, *kwargs.values())], "output": output.detach().clone()}
    output.register_hook(lambda gradient: call.__setitem__("gradient", gradient.clone()))
    calls.append(call)


def _loss(model: Any, segment: Segment) -> torch.Tensor:
    logits = model(input_ids=segment.input_ids, attention_mask=segment.attention_mask, use_cache=False).logits
    counted = segment.loss_mask[:, 1:]
    targets = segment.input_ids[:, 1:][counted]
    return torch.nn.functional.cross_entropy(logits[:, :-1][counted].float(), targets, reduction="sum")
