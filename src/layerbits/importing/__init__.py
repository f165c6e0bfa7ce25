"""Results of earlier tools as ours: their files in, :class:`SensitivityResult` out (no MLflow, torch for states alone).

What a file does not say stays unknown: no calibration, bits or hash is made up.
"""

from layerbits.importing.convert import results, write
from layerbits.importing.layouts import Table, collect, read
from layerbits.importing.state import StateFile, read_state, state_results, states

__all__ = ["StateFile", "Table", "collect", "read", "read_state", "results", "state_results", "states", "write"]
