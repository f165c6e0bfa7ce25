"""What earlier runs found, read from MLflow as tidy pandas frames. Imports neither torch nor mlflow.

from layerbits import history
runs = history.runs(model="qwen3_vl_4b", pair="wint8_aint8", since="2026-05-01")
scores = history.scores(runs)
"""

from layerbits.history.comparison import Comparison, compare
from layerbits.history.derived import probes, schemes
from layerbits.history.evaluated import evaluations
from layerbits.history.query import result, runs, scores
from layerbits.history.recipes import best_scheme, pareto

__all__ = [
    "Comparison",
    "best_scheme",
    "compare",
    "evaluations",
    "pareto",
    "probes",
    "result",
    "runs",
    "schemes",
    "scores",
]
