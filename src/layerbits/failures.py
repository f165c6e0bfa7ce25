"""What failed in this process while the rest of a multirun or a grid went on: the exit status goes by it."""

from __future__ import annotations

failed: list[str] = []
"""Why jobs of the multirun, or cells of the grid, failed, one line each."""
