"""Results of earlier tools as ours: their JSON files in, :class:`SensitivityResult` out (no torch, no MLflow).

What a file does not say stays unknown: no calibration, bits or hash is made up.
"""

from layerbits.importing.convert import results, write
from layerbits.importing.layouts import Table, collect, read

__all__ = ["Table", "collect", "read", "results", "write"]
