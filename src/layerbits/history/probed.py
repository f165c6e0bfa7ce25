"""What probes measured of one scheme."""

from __future__ import annotations

from layerbits.history.source import search, store_errors
from layerbits.tracking.contract import DIGEST_TAG


def probed_kl(uri: str, experiment: str, scheme: str, digest: str) -> float | None:
    """The KL that the latest finished probe of a scheme measured, nats per token; ``None`` without a probe.

    Args:
        uri: The store.
        experiment: Experiment id.
        scheme: Its name.
        digest: Its digest: a name may mean another scheme in another run.

    Raises:
        UserError: The store cannot be read.
    """
    condition = "tags.`layerbits.kind` = 'probe' AND tags.outcome = 'ok'"
    metric = f"probe/{scheme}/kl"
    with store_errors(uri):
        values = search(
            uri,
            experiment,
            condition,
            lambda run: run.metrics.get(metric) if run.tags.get(f"{DIGEST_TAG}{scheme}") == digest else None,
        )
    return next((kl for kl in reversed(values) if kl is not None), None)
