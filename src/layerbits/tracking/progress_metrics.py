"""How far a run is, as metrics of the run while it runs: ``progress/…`` in the UI."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from layerbits.progress import Report, listening

if TYPE_CHECKING:
    from mlflow.entities import Metric


_PATIENCE = 2.0  # seconds that the end of a run waits for a write that is under way


@contextmanager
def progress_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Logs reports of progress to a run, from a thread: a slow server must not hold up the pass, nor end it."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri)
    waiting: queue.Queue[Report | None] = queue.Queue(maxsize=1)

    def write() -> None:
        while (report := waiting.get()) is not None:
            try:
                client.log_batch(run_id, metrics=_metrics(report))
            except Exception:  # the run itself will say that the store is gone
                continue

    def hear(report: Report) -> None:
        try:
            waiting.put_nowait(report)
        except queue.Full:  # the last one is still on its way
            return

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        with listening(hear):
            yield
    finally:
        try:
            waiting.put(None, timeout=_PATIENCE)
            thread.join(_PATIENCE)
        except queue.Full:  # a daemon: it ends with the process
            pass


def _metrics(report: Report) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    values = {"steps": report.steps, "percent": report.percent, "eta_seconds": report.eta_seconds}
    return [Metric(f"progress/{key}", float(value), now, report.steps) for key, value in values.items()]
