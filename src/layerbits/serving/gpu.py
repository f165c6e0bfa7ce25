"""What is known of the GPU of this machine before vLLM is started on it: what it computes, and what fits."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from layerbits.checkpoint.gpus import PINNED, Kernel, kernel
from layerbits.checkpoint.label import Label
from layerbits.checkpoint.processors import MISSING, OTHERWISE
from layerbits.checkpoint.reader import Checkpoint, Entry
from layerbits.errors import UserError
from layerbits.export.target import THIS_MACHINE, find_target
from layerbits.schemes.sizes import GIB
from layerbits.serving.environment import Environment

_USED = 0.9
"""Share of a card's memory that vLLM takes by default."""


def otherwise_on_gpu(labels: Iterable[Label], environment: Environment) -> str:
    """The layouts that vLLM does not compute as written here, and how it does, in one line; empty without any.

    Args:
        labels: Of the checkpoint.
        environment: Where vLLM is; a build for CPUs uses no GPU.
    """
    return _in_words(labels, environment, (OTHERWISE, MISSING))


def missing_on_gpu(labels: Iterable[Label], environment: Environment) -> str:
    """The layouts that vLLM has no kernel for here, in one line; empty without any.

    Args:
        labels: Of the checkpoint.
        environment: Where vLLM is; a build for CPUs uses no GPU.
    """
    return _in_words(labels, environment, (MISSING,))


def rounding_on_gpu(labels: Iterable[Label], environment: Environment) -> str:
    """The kernels here that compute as written and were measured to round more than PyTorch; empty without any.

    Args:
        labels: Of the checkpoint.
        environment: Where vLLM is; a build for CPUs uses no GPU.
    """
    target, kernels = _kernels(labels, environment)
    known = [f"{algo} is computed by {one.name}: {one.rounding}" for algo, one in kernels.items() if one.rounding]
    return f"on this GPU ({target}) {'; '.join(known)}" if known else ""


def unsaid_kernels(labels: Iterable[Label], environment: Environment) -> list[str]:
    """The kernels here that serve some labels and that vLLM does not name in its log.

    Args:
        labels: Of the checkpoint.
        environment: Where vLLM is; a build for CPUs uses no GPU.
    """
    _, kernels = _kernels(labels, environment)
    return [one.name for algo, one in kernels.items() if algo in PINNED and one.name]


def check_card(checkpoint: Checkpoint, environment: Environment, arguments: Sequence[str]) -> None:
    """Checks that the weights of a checkpoint fit on the GPUs that serve it, before vLLM is started.

    Args:
        checkpoint: What is served.
        environment: Where vLLM is; a build for CPUs uses no GPU.
        arguments: Of the server.

    Raises:
        UserError: They do not; what is left for the KV cache is not looked at.
    """
    card = None if environment.on_cpu else _card_bytes()
    if card is None:
        return
    size = sum(map(_in_vllm, checkpoint.entries.values()))
    cards, share = _given(arguments)
    if size > card * cards * share:
        raise UserError(
            f"{checkpoint.folder} has {size / GIB:.1f} GiB of weights, and vLLM takes {share:g} of {cards} x "
            f"{card / GIB:.1f} GiB here; use more cards (--tensor-parallel-size), or a smaller scheme (budget_gib)"
        )


def card_name(environment: Environment) -> str | None:
    """The first GPU that a vLLM would use here; ``None`` for a build for CPUs, or without one.

    Args:
        environment: Where vLLM is.
    """
    import torch

    return None if environment.on_cpu or not torch.cuda.is_available() else torch.cuda.get_device_name(0)


def _in_words(labels: Iterable[Label], environment: Environment, states: Sequence[str]) -> str:
    target, kernels = _kernels(labels, environment)
    unlike = [
        f"{algo} is {one.computed}{f' ({one.name})' if one.name else ''}"
        for algo, one in kernels.items()
        if one.computed.state in states
    ]
    return f"on this GPU ({target}) {'; '.join(unlike)}" if unlike else ""


def _kernels(labels: Iterable[Label], environment: Environment) -> tuple[str | None, dict[str, Kernel]]:
    """The generation of the GPU here, and what its vLLM serves each label by; none on CPUs."""
    target = None if environment.on_cpu else find_target(THIS_MACHINE)
    if target is None:
        return None, {}
    version = environment.version.split("+")[0]
    by_algo = {label.algo: label.format for label in labels}
    mixed = len(by_algo) > 1
    return target, {algo: kernel(by_algo[algo], algo, target, version, mixed) for algo in sorted(by_algo)}


def _in_vllm(entry: Entry) -> int:
    """Bytes of a tensor in vLLM, which has 16 bits of what is float32 in the files."""
    wide = entry.dtype.is_floating_point and entry.dtype.itemsize > 2
    return entry.elements * 2 if wide else entry.stop - entry.start


def _card_bytes() -> int | None:
    """Memory of the first GPU that PyTorch sees; ``None`` without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _given(arguments: Sequence[str]) -> tuple[int, float]:
    """Number of cards that the server's arguments ask for, and the share of their memory; vLLM reads them again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=_USED)
    try:
        found, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # vLLM says what is wrong with them
        return 1, _USED
    return found.tensor_parallel_size * found.pipeline_parallel_size, found.gpu_memory_utilization
