"""ModelOpt's own record of a search, its AutoQuantize checkpoint or returned state, as results of ours."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerbits.errors import UserError
from layerbits.importing.convert import PRESETS
from layerbits.plain import JsonMapping
from layerbits.results.assignment import Assignment
from layerbits.results.result import Allocation, CalibrationInfo, CandidateInfo, Group, ModelInfo, SensitivityResult
from layerbits.scoring.groups import named_groups

if TYPE_CHECKING:
    from modelopt.torch.quantization.algorithms import QuantRecipe

SUFFIXES = (".pt", ".pth")
LAYOUT = "AutoQuantize state"
_SUFFIX = ".quant_recipe"


@dataclass(frozen=True)
class StateFile:
    """A search that ModelOpt recorded.

    Attributes:
        path: The file. digest: SHA-256 of it.
        state: What ``torch.load`` gives, less the calibrated ranges.
    """

    path: Path
    digest: str
    state: JsonMapping


def states(path: Path) -> list[Path]:
    """The files of a path, or of a folder and below, that may be states."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in SUFFIXES and file.is_file()]


def read_state(path: Path) -> StateFile:
    """Reads a state with ``weights_only=True``: a file that would run code is refused, not run.

    Raises:
        UserError: No such file, not one that ``torch.save`` wrote, one that holds other objects, or no search.
    """
    import modelopt.torch.quantization.algorithms  # noqa: F401 - makes its classes known to torch
    import torch

    try:
        content = path.read_bytes()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} holds more than plain data and ModelOpt's formats ({line}); it is not loaded"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a file of torch.save or is cut off ({line}); fetch it again") from None
    if not isinstance(state, Mapping) or not isinstance(state.get("candidate_stats"), Mapping):
        raise UserError(f"{path} is no AutoQuantize state: it has no candidate_stats; leave it out")
    if not state["candidate_stats"]:
        raise UserError(f"{path} was written before the search had scores; give the checkpoint of a finished search")
    kept = {key: value for key, value in state.items() if key != "quantizer_states"}
    return StateFile(path, hashlib.sha256(content).hexdigest(), kept)


def state_results(file: StateFile, model: str = "") -> list[SensitivityResult]:
    """One result per format: scores, costs and what the search chose.

    Args:
        file: From :func:`read_state`.
        model: Name of the model, which a state does not tell.

    Raises:
        UserError: No group had a choice.
    """
    stats = {
        name: stat
        for name, stat in file.state["candidate_stats"].items()
        if not stat.get("is_fixed") and any(not _unquantized(form) for form in stat["formats"])
    }
    forms = list(dict.fromkeys(form for stat in stats.values() for form in stat["formats"] if not _unquantized(form)))
    if not forms:
        raise UserError(f"{file.path} has no group with a choice of formats; leave it out")
    infos = _candidates(forms)
    return [_result(file, stats, form, info, len(forms), model) for form, info in zip(forms, infos, strict=True)]


def _result(
    file: StateFile, stats: JsonMapping, form: QuantRecipe, info: CandidateInfo, forms: int, model: str
) -> SensitivityResult:
    mine = {name: stat for name, stat in stats.items() if form in stat["formats"]}
    groups = _groups(mine)
    raw = np.array([float(stat["scores"][stat["formats"].index(form)]) for stat in mine.values()])
    best = file.state.get("best") or {}
    recipe = best.get("recipe") or {}
    chosen = Assignment(info.name if recipe[name] == form else None for name in mine) if recipe else Assignment()
    lines = [f"imported from {file.path.name} ({LAYOUT}): it does not say what it was calibrated and scored on"]
    clamped = forms > 1
    if clamped:
        lines.append(
            f"{forms} formats were scored in one call of mtq.auto_quantize, which lowers a score to that of a format "
            "with fewer bits: scores may be clamped"
        )
    cost = file.state.get("cost_model", "weight")
    if cost != "weight":
        lines.append(f"the search counted bits by cost_model={cost}")
    return SensitivityResult(
        model=ModelInfo(model or "unknown", model, "", "", ""),
        calibration=CalibrationInfo("", "", "", "", None, None, None, None, None, None, None, (), math.nan),
        method=str(file.state.get("method") or ""),
        engine="stock",
        seed=None,
        device="",
        groups=groups,
        candidate=info,
        scores=np.where(np.isfinite(raw), raw, np.nan),
        predicted_kl=np.full_like(raw, np.nan),
        allocation=Allocation(
            target_bits=math.nan,
            assignment=chosen,
            effective_bits=_bits(groups, chosen, info) if chosen else math.nan,
            effective_bits_modelopt=float((best.get("constraints") or {}).get("effective_bits", math.nan)),
            score=float(sum(s for s, c in zip(raw, chosen, strict=True) if c)) if chosen else math.nan,
        ),
        tags={
            "source": "imported",
            "import.layout": LAYOUT,
            "import.file": file.path.name,
            "import.sha256": file.digest,
            "scores_clamped": str(clamped).lower(),
        },
        warnings=tuple(lines),
    )


def _candidates(forms: Sequence[QuantRecipe]) -> list[CandidateInfo]:
    """The formats under our names; one that is none of ours as ModelOpt names it."""
    from layerbits.candidates import backends
    from layerbits.candidates.known import candidates_of, config_of

    infos = []
    for form in forms:
        config = config_of(form.config)
        entries = [e for e in config["quant_cfg"] if e["quantizer_name"] != "*output_quantizer"]
        config["quant_cfg"] = [_as_written(entry, backends.BACKENDS) for entry in entries]
        name = str(form).partition("(")[0]
        try:
            (candidate,) = candidates_of([config], name)
        except UserError:
            weight, activation = PRESETS.get(name, ("", ""))
            bits = form.compression * 16
            infos.append(CandidateInfo(name, "", "", name, weight, activation, {}, "", math.nan, bits))
            continue
        infos.append(candidate.info)
    return infos


def _as_written(entry: Mapping[str, object], ours: Collection[str]) -> dict[str, object]:
    """An entry without the kernels of ours that a search without a GPU names."""
    cfg = entry.get("cfg")
    if not isinstance(cfg, Mapping) or cfg.get("backend") not in ours:
        return dict(entry)
    return {**entry, "cfg": {key: value for key, value in cfg.items() if key != "backend"}}


def _groups(stats: JsonMapping) -> tuple[Group, ...]:
    fused = []
    for name, stat in stats.items():
        modules = tuple(stat.get("module_names") or (name.removesuffix(_SUFFIX),))
        weight = float(stat.get("cost_weight", 1.0))
        whole = float(stat.get("uncompressed_cost", stat["costs"][-1]))
        fused.append((modules, round(whole / weight) if weight else 0))
    head = next((m[0] for m, _ in fused if m[0].rpartition(".")[2] == "lm_head"), None)
    return named_groups(None, fused, head)


def _bits(groups: Sequence[Group], chosen: Sequence[str | None], info: CandidateInfo) -> float:
    """Storage bits per weight if only this format's part of the choice were quantized."""
    total = sum(g.weights for g in groups)
    quantized = sum(g.weights for g, name in zip(groups, chosen, strict=True) if name is not None)
    return 16 + (info.bits - 16) * quantized / total if total else math.nan


def _unquantized(form: QuantRecipe) -> bool:
    return bool(form.compression >= 1.0)
