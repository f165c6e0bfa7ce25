"""What runs and schemes are called: what tells one from its neighbours in a narrow list first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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


def scheme_title(scheme: str, candidates: Sequence[str], model: str) -> str:
    """What a scheme is called beside those of other runs, which may have its short name, too.

    Args:
        scheme: Its short name.
        candidates: What its linears are; of more than two the first is named.
        model: Name of the model.
    """
    made_of = " + ".join(candidates) if len(candidates) < 3 else f"{candidates[0]} and {len(candidates) - 1} more"
    return " ".join(filter(None, (scheme, made_of, model)))
