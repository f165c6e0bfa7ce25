"""The format of an export: the one that was asked for, or the first that says what was scored and is read by vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerbits.checkpoint.label import AUTO, FORMATS, Label
from layerbits.checkpoint.labels import STAYS, label_or_reason
from layerbits.checkpoint.runtimes import only_alone, reads
from layerbits.errors import Unsupported
from layerbits.results.result import CandidateInfo
from layerbits.schemes.sizes import how_read


def choose_format(candidates: Sequence[CandidateInfo], format: str) -> tuple[str, dict[str, Label]]:
    """The format of an export and its labels, by the names of the candidates.

    Args:
        candidates: Those of a scheme.
        format: One of :data:`FORMATS`, or :data:`AUTO`: the first of them in which every vLLM that is known reads the
            candidates together, else the first in which it reads each, else the first that has labels at all.

    Raises:
        Unsupported: A candidate that no label says, in any of them.
    """
    complete: dict[str, dict[str, Label]] = {}
    reasons = []
    for name in FORMATS if format == AUTO else (format,):
        labels: dict[str, Label] = {}
        for info in candidates:
            label, why = label_or_reason(info, name)
            if label is None:
                reasons.append(f"{info.name} cannot be exported as {name}: {why}")
                break
            labels[info.name] = label
        else:
            complete[name] = labels
    if not complete:
        raise Unsupported(f"{'; '.join(reasons)}; {STAYS}")
    best = max(complete, key=lambda name: _read(complete[name]))  # of equal ones the first
    return best, complete[best]


def _read(labels: Mapping[str, Label]) -> int:
    served = frozenset(name for name, label in labels.items() if reads(label))
    return how_read(labels, served, frozenset(name for name in served if only_alone(labels[name])))
