"""What PyTorch computes of the texts: the unquantized model, the scheme as scored, and the checkpoint restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerbits.serving.distributions import Events

if TYPE_CHECKING:
    from layerbits.checkpoint.reader import Checkpoint
    from layerbits.inputs.calibration import Batch
    from layerbits.probing.loading import Prepared
    from layerbits.results.result import FloatArray


@dataclass(frozen=True, eq=False)
class Whole:
    """Log-probabilities of the whole vocabulary, ``[n, vocabulary]`` float32 in host memory."""

    logprobs: Any

    def at(self, events: Events) -> FloatArray:
        """Those of some events."""
        import torch

        found = self.logprobs[torch.from_numpy(events.position), torch.from_numpy(events.token)]
        return np.asarray(found.double().numpy())

    def kl(self, other: Whole) -> FloatArray:
        """KL divergence of another from this one at each position, over the whole vocabulary, nats."""
        import torch

        parts = []
        for ours, theirs in zip(self.logprobs.split(64), other.logprobs.split(64), strict=True):
            a, b = ours.double(), theirs.double()
            parts.append((a.exp() * (a - b)).sum(-1))
        return np.asarray(torch.cat(parts).numpy())


@dataclass(frozen=True, eq=False)
class Plain:
    """The source's model on the texts, in float32.

    Attributes:
        unquantized: As it is.
        rounded: What its modules return rounded to the runtime's dtype.
    """

    unquantized: Whole
    rounded: Whole


@dataclass(frozen=True, eq=False)
class Reference:
    """Models in PyTorch, in float32, on the same texts.

    Attributes:
        plain: Without the scheme.
        scored: With the scheme, as it was scored.
        rounded: The same, rounded too: another computation of the same scheme, which tells what rounding alone does.
        restored: The model made of the checkpoint alone.
    """

    plain: Plain
    scored: Whole
    rounded: Whole
    restored: Whole


def reference(
    prepared: Prepared,
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    dtype: str,
    device: str,
    plain: Plain | None = None,
) -> Reference:
    """Computes all of them, the checkpoint after the source.

    Args:
        prepared: The scheme with its source.
        checkpoint: Its export.
        batches: The texts.
        dtype: The runtime's, ``bfloat16`` or ``float16``; ``float32`` rounds nothing.
        device: ``cpu`` or ``cuda``.
        plain: Of an earlier scheme of the same source on the same texts.

    Raises:
        UserError: The source or the checkpoint cannot be loaded.
    """
    from layerbits.checkpoint.labels import read_quantization
    from layerbits.checkpoint.restore import restore
    from layerbits.probing.apply import apply_scheme, find_ranges

    model = prepared.load(device).model
    ranges = find_ranges(model, [prepared.scheme], prepared.calibration)  # as they were found when it was scored
    model.float()
    if plain is None:
        unquantized = _logprobs(model, batches)
        with _rounding(model, dtype):
            plain = Plain(unquantized, _logprobs(model, batches))
    with apply_scheme(model, prepared.scheme, ranges):
        scored = _logprobs(model, batches)
        with _rounding(model, dtype):
            rounded = _logprobs(model, batches)
    del model
    restored = _logprobs(restore(checkpoint, read_quantization(checkpoint), device).float(), batches)
    return Reference(plain, scored, rounded, restored)


def _logprobs(model: Any, batches: Sequence[Batch]) -> Whole:
    import torch

    from layerbits.scoring.steps import predictions

    with torch.no_grad():
        found = [predictions(model, s)[0].float().log_softmax(-1).cpu() for batch in batches for s in batch.segments]
    return Whole(torch.cat(found))


@contextmanager
def _rounding(model: Any, dtype: str) -> Iterator[None]:
    """Rounds what every module without children returns, as a runtime does that computes in that dtype."""
    import torch

    narrow = getattr(torch, dtype)
    leaves = [m for m in model.modules() if not list(m.children())]

    def narrowed(_module: Any, _inputs: Any, out: Any) -> Any:
        return out.to(narrow).to(out.dtype) if isinstance(out, torch.Tensor) and out.is_floating_point() else out

    hooks = [module.register_forward_hook(narrowed) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
