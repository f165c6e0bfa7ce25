"""A model that was not scored, as the source of a table of costs: its groups by name, and candidates that are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from layerbits.candidates.candidate import Candidate, resolve_candidate
from layerbits.candidates.fused import fused
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.errors import UserError
from layerbits.inputs.kinds import kinds_of
from layerbits.inputs.loading import empty_model
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import output_head, resolve, scored_linears
from layerbits.results.result import CalibrationInfo, ModelInfo
from layerbits.schemes.source import Source
from layerbits.scoring.groups import named_groups

_DEFAULT = "default"
_NO_DATA = CalibrationInfo("", "", "", "", 0, 0, None, None, None, None, 0, (), 0.0)


def unscored(path: str, candidates: Sequence[str]) -> Source:
    """A model's groups under some candidates, without scores; of its files the config is enough.

    Groups are of the linears that some candidate covers: a run would not score the output head either.

    Args:
        path: Folder of a model, or its id on the hub.
        candidates: ``pair``, ``pair/granularity`` or ``pair/granularity/nvfp4``.

    Raises:
        UserError: The model is not found, or a candidate is not known.
    """
    values = {"name": Path(path).name, "path": path, "random_weights": True}
    resolved = resolve(ModelSpec.from_mapping(values))
    model = empty_model(resolved)
    linears = scored_linears(model, resolved.spec)
    head = output_head(model)
    kinds = kinds_of(model, list(linears), head)
    named = [_candidate(text) for text in dict.fromkeys(candidates)]
    linears = {n: s for n, s in linears.items() if any(c.format.linear.covers(n, kind=kinds[n]) for c in named)}
    sizes = {name: sum(rows * columns for rows, columns in shapes) for name, shapes in linears.items()}
    families = [(tuple(names), sum(sizes[name] for name in names)) for names in fused(linears)]
    groups = named_groups(model, families, head)
    infos = tuple(candidate.info for candidate in named)
    nothing = np.full((len(groups), len(infos)), np.nan)
    dtype = str(resolved.dtype).removeprefix("torch.")
    info = ModelInfo(resolved.spec.name, path, resolved.revision, type(model).__name__, dtype)
    settings = {"model": values}
    return Source((path,), info, _NO_DATA, "", groups, infos, nothing, nothing, "weight", None, settings)


def _candidate(text: str) -> Candidate:
    name, _, rest = text.partition("/")
    granularity, _, fp4 = rest.partition("/")
    pair = next((pair for pair in load_pairs() if pair.name == name), None)
    overlay = next((one for one in load_overlays() if one.name == (granularity or _DEFAULT)), None)
    if pair is None or overlay is None:
        raise UserError(f"candidate {text} is not known; give PAIR or PAIR/GRANULARITY, for instance wfp8_afp8")
    return resolve_candidate(pair, overlay, fp4 or "mxfp4", experimental=True)
