"""Figures of sensitivity results, for reports and notebooks alike: plain data in, matplotlib ``Figure`` out.

A frame is tidy: one row per group (and candidate) with the columns of :meth:`SensitivityResult.rows`; ``low`` and
``high`` hold an interval of the drawn value where one is known. Nothing here touches pyplot or other global state; in
a notebook ``%matplotlib inline`` makes a returned figure show itself.
Figures are drawn with matplotlib's own defaults (:mod:`layerbits.figures.settings`).
"""

from layerbits.figures.settings import import_matplotlib

import_matplotlib()  # before the modules that import it

from layerbits.figures.answers import answers  # noqa: E402
from layerbits.figures.choices import choice_strips  # noqa: E402
from layerbits.figures.compare import overlay, pareto, rank_change, rank_correlation, scatter_agreement  # noqa: E402
from layerbits.figures.run import by_layer, cumulative_share, heatmap, ranked_bars, save_figures  # noqa: E402
from layerbits.results.frames import groups_for_share, tidy  # noqa: E402

__all__ = [
    "answers",
    "by_layer",
    "choice_strips",
    "cumulative_share",
    "groups_for_share",
    "heatmap",
    "overlay",
    "pareto",
    "rank_change",
    "rank_correlation",
    "ranked_bars",
    "save_figures",
    "scatter_agreement",
    "tidy",
]
