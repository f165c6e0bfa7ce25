"""What a GPU will compute of candidates and exports, said before they are scored or made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.checkpoint.expert_names import expert_module
from layerbits.checkpoint.gpus import TARGETS, VERSION, Kernel, generation, kernel
from layerbits.checkpoint.label import AUTO
from layerbits.checkpoint.processors import MISSING, OTHERWISE, UNKNOWN, WRITTEN
from layerbits.checkpoint.runtimes import refused_modules
from layerbits.errors import Unsupported, UserError
from layerbits.results.result import CandidateInfo

if TYPE_CHECKING:
    from layerbits.export.plan import ExportPlan

NO_TARGET, THIS_MACHINE = "none", "auto"


def find_target(name: str) -> str | None:
    """The generation of the GPU that will serve.

    Args:
        name: A GPU of :data:`layerbits.checkpoint.gpus.TARGETS`, ``auto`` for the one of this machine, or ``none``.

    Returns:
        The generation, or ``None`` for ``none`` and for a machine without an NVIDIA GPU.

    Raises:
        UserError: It is not known.
    """
    if name == NO_TARGET:
        return None
    if name != THIS_MACHINE:
        if name.lower() not in TARGETS:
            raise UserError(f"target={name} is not known; use {', '.join(TARGETS)}, {THIS_MACHINE} or {NO_TARGET}")
        return TARGETS[name.lower()]
    import torch

    return generation(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def differences(plan: ExportPlan, target: str) -> list[str]:
    """A line for each layout of an export that vLLM does not compute as written on a generation of GPUs."""
    lines = []
    algos = sorted({label.algo for label in plan.labels.values()})
    for algo in algos:
        answer = kernel(plan.format, algo, target, mixed=len(algos) > 1)
        if answer.computed.state in (OTHERWISE, MISSING):
            lines.append(f"{plan.scheme.name}: {_not_as_scored(algo, answer, target)}")
    return lines


def refused(plan: ExportPlan) -> list[str]:
    """A line for each part of an export that vLLM refuses, or reads wrongly, on whichever machine."""
    algos = {module: plan.labels[info.name].algo for module, info in plan.scheme.modules.items()}
    mixture, architecture = any(map(expert_module, plan.source.entries)), plan.scheme.model.architecture
    return [f"{plan.scheme.name}: {line}" for line in refused_modules(plan.format, algos, architecture, mixture)]


def as_served(candidates: Sequence[CandidateInfo], target: str | None) -> list[str]:
    """What a generation of GPUs computes of some candidates, a line each, with what to score instead.

    Args:
        candidates: Before they are scored, or as they were.
        target: From :func:`find_target`; nothing is said without one.
    """
    return [] if target is None else [_line(info, target) for info in candidates]


def _line(info: CandidateInfo, target: str) -> str:
    known = _served(info, target)
    if known is None:
        return f"{info.name} cannot be exported, so vLLM does not serve it on {target}"
    algo, answer = known
    if answer.computed.state == WRITTEN:
        by = f" by {answer.name}" if answer.name else ""
        but = f", but {answer.rounding}" if answer.rounding else ""
        what = f"{info.name} ({algo}) as it is scored{by}{but}"
        return f"on {target} vLLM {VERSION} computes {what} ({answer.source})"
    if answer.computed.state == UNKNOWN:
        return f"what vLLM {VERSION} computes of {info.name} ({algo}) on {target} is not known: {answer.computed.how}"
    better = _instead(info, target)
    offered = f"; {better} is computed as it is scored" if better else ""
    return f"{_not_as_scored(f'{info.name} ({algo})', answer, target)}{offered}"


def _not_as_scored(what: str, answer: Kernel, target: str) -> str:
    by = f" ({answer.name})" if answer.name else ""
    how = (answer.computed.how or "it has no kernel for it").split(". ")[0]  # of a runtime's words the first sentence
    return f"on {target} vLLM {VERSION} does not compute {what} as it is scored: {how}{by}; {answer.source}"


def _served(info: CandidateInfo, target: str) -> tuple[str, Kernel] | None:
    """The label that a candidate is exported with and what serves it; ``None`` where no label says it."""
    from layerbits.checkpoint.formats import choose_format

    try:
        format, labels = choose_format([info], AUTO)
    except Unsupported:
        return None
    algo = labels[info.name].algo
    return algo, kernel(format, algo, target)


def _instead(info: CandidateInfo, target: str) -> str:
    """The shipped candidate of the same weights that is computed as scored: rounded inputs first, else 16 bits."""
    variant = "nvfp4" if "nvfp4" in info.format_name.lower() else "mxfp4"
    by_activation: dict[str, str] = {}
    overlays = load_overlays()
    for pair in load_pairs():
        if pair.experimental or pair.weight != info.weight_precision:
            continue
        for overlay in overlays:
            try:
                made = resolve_candidate(pair, overlay, variant).info
            except UserError:
                continue  # the overlay does not fit the pair
            known = None if made.name == info.name else _served(made, target)
            if known is not None and known[1].computed.state == WRITTEN:
                by_activation.setdefault(pair.activation, made.name)
    return by_activation.get(info.activation_precision, by_activation.get("fp16", ""))
