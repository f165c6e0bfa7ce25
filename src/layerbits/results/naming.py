"""What a run is called: what tells it from its neighbours in a narrow list first."""

from __future__ import annotations

from collections.abc import Collection

AXES = ("quant_pair", "dataset_size", "granularity")
"""What a sweep varies, as it stands in a name: the UI's colours tell granularities apart, but not sizes."""


def run_name(model: str, quant_pair: str, granularity: str, dataset_size: str, varied: Collection[str] = AXES) -> str:
    """Name of a run: what varies, what else of the axes there is, and the model; unknown parts are left out.

    Args:
        model: Its name.
        quant_pair: One, or several joined by ``+``.
        granularity: Likewise.
        dataset_size: ``small``, ``medium``, …
        varied: Those of :data:`AXES` that differ among the runs it is seen with.
    """
    values = {"quant_pair": quant_pair, "dataset_size": dataset_size, "granularity": granularity}
    order = sorted(AXES, key=lambda axis: axis not in varied)
    return " ".join(filter(None, (*(values[axis] for axis in order), model)))
