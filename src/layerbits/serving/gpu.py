"""What the GPU of this machine computes of a checkpoint's layouts, as far as it is known for the installed vLLM."""

from __future__ import annotations

from collections.abc import Iterable

from layerbits.checkpoint.gpus import kernel
from layerbits.checkpoint.label import Label
from layerbits.checkpoint.processors import MISSING, OTHERWISE
from layerbits.export.target import THIS_MACHINE, find_target
from layerbits.serving.environment import Environment


def otherwise_on_gpu(labels: Iterable[Label], environment: Environment) -> str:
    """The layouts that vLLM does not compute as written here, and how it does, in one line; empty without any.

    Args:
        labels: Of the checkpoint.
        environment: Where vLLM is; a build for CPUs uses no GPU.
    """
    target = None if environment.on_cpu else find_target(THIS_MACHINE)
    if target is None:
        return ""
    version = environment.version.split("+")[0]
    found = {label.algo: kernel(label.format, label.algo, target, version) for label in labels}
    told = [
        f"{algo} is {one.computed}{f' ({one.name})' if one.name else ''}"
        for algo, one in sorted(found.items())
        if one.computed.state in (OTHERWISE, MISSING)
    ]
    return f"on this GPU ({target}) {'; '.join(told)}" if told else ""
