"""A scheme that was made without a table of costs, with its milliseconds by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerbits.schemes.budget_kinds import Counted, Measure, Timed
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import Source
from layerbits.schemes.times import MILLISECONDS


def with_milliseconds(scheme: Scheme, timed: Timed, measure: Measure) -> Scheme:
    """The scheme with what its step takes, as schemes have it that are made with ``costs=``.

    Args:
        scheme: Of a file.
        timed: Which step, by which table.
        measure: Finds the seconds.

    Raises:
        UserError: As ``measure``.
    """
    unscored = np.full((len(scheme.groups), len(scheme.candidates)), np.nan)
    source = Source(
        run_ids=scheme.source_run_ids,
        model=scheme.model,
        calibration=scheme.calibration,
        method="",
        groups=scheme.groups,
        candidates=scheme.candidates,
        scores=unscored,
        predicted_kl=unscored,
        cost_model="weight",
        all_weights=None,
        settings=scheme.settings,
        kv_cache=scheme.kv_cache,
    )
    found = measure(source, Counted(timed=timed))
    counted = found.counted(scheme.assignment)
    earlier = {key: value for key, value in scheme.size.items() if key not in MILLISECONDS}
    return replace(scheme, size={**earlier, **counted}, how={**scheme.how, **found.timed_on})
