"""How far a run is: a bar with the estimated end on the terminal, and a report to whoever listens, now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

REPORT_SECONDS = 10.0
"""Listeners hear nothing more often than this."""


@dataclass(frozen=True)
class Report:
    """How far the work of a run is.

    Attributes:
        phase: What is being done.
        steps: Steps done, of all phases.
        percent: Of the estimated time.
        eta_seconds: Estimated seconds to the end.
    """

    phase: str
    steps: int
    percent: float
    eta_seconds: float


Item = TypeVar("Item")
Listener = Callable[[Report], None]


class _Current:
    """What is in force: the ``with`` blocks of this module change one thing each, and put back what was before.

    Attributes:
        listener: Who hears reports.
        work: The phases of the run, where they were planned.
        part: Takes the share of the current step that is done.
        hidden: Whether bars are not shown.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.work: _Work | None = None
        self.part: Callable[[float], None] | None = None
        self.hidden = False


_current = _Current()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Reports go to this listener meanwhile, and not to those outside."""
    before, _current.listener = _current.listener, listener
    try:
        yield
    finally:
        _current.listener = before


@dataclass
class _Phase:
    steps: int
    cost: float  # of a step, relative to those of other phases
    done: float = 0.0


class _Work:
    """Phases, what is done of them, and how long it took."""

    def __init__(self, phases: dict[str, _Phase]) -> None:
        self._phases = phases
        self._reported = time.monotonic()  # a run of a few seconds reports nothing
        self._pace = 0.0  # seconds per unit of cost

    def holds(self, name: str) -> bool:
        return name in self._phases

    def start(self, name: str, steps: int, done: int) -> None:
        for before in list(self._phases.values())[: list(self._phases).index(name)]:
            before.steps = int(before.done)  # it was not needed, or is over
        phase = self._phases[name]
        phase.steps, phase.done = steps, float(done)
        self._at, self._before, self._began, self._first = phase, float(done), time.monotonic(), 0.0
        self._name = name

    def reached(self, done: float) -> Report:
        now = time.monotonic()
        phase = self._at
        phase.done = done
        mine = done - self._before
        if not self._first and mine >= 1:
            self._first = now  # the first step warms up: from the second on it does not count
        if mine >= 2:
            self._pace = (now - self._first) / (mine - 1) / phase.cost
        elif mine > 0:
            self._pace = (now - self._began) / mine / phase.cost
        left = sum(p.cost * max(0.0, p.steps - p.done) for p in self._phases.values())
        whole = sum(p.cost * p.steps for p in self._phases.values())
        report = Report(
            self._name,
            int(sum(p.done for p in self._phases.values())),
            100 * (1 - left / whole) if whole else 100.0,
            left * self._pace,
        )
        if _current.listener is not None and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            _current.listener(report)
        return report


@contextmanager
def planned(**phases: tuple[int, float]) -> Iterator[None]:
    """Says what :func:`progress` will be called for, so that percent and end are those of all of it.

    Args:
        phases: Name → steps, and what a step costs relative to one of another phase.
    """
    work = _Work({name: _Phase(steps, cost) for name, (steps, cost) in phases.items()})
    before, _current.work = _current.work, work
    try:
        yield
    finally:
        _current.work = before


@contextmanager
def hidden() -> Iterator[None]:
    """Shows no bars meanwhile: what runs is no run of the user's."""
    before, _current.hidden = _current.hidden, True
    try:
        yield
    finally:
        _current.hidden = before


def progress(items: Sequence[Item], what: str, done: int = 0) -> Iterator[Item]:
    """The items under a progress bar.

    Args:
        items: What is left to do.
        what: Name of the phase.
        done: Steps of it that were done before.
    """
    from tqdm import tqdm

    whole = _current.work
    work = whole if whole is not None and whole.holds(what) else _Work({what: _Phase(len(items), 1.0)})
    total = done + len(items)
    work.start(what, total, done)
    # a log file need not have a line for each step
    seconds = 0.1 if sys.stderr.isatty() else REPORT_SECONDS
    quiet = _current.hidden or int(os.environ.get("RANK", "0")) > 0
    with tqdm(
        total=total, initial=done, desc=what, unit="batch", mininterval=seconds, miniters=0, disable=quiet
    ) as bar:

        def reached(count: float) -> None:
            report = work.reached(count)
            end = datetime.now() + timedelta(seconds=report.eta_seconds)
            form = "%H:%M" if report.eta_seconds < 86400 / 2 else "%a %H:%M"
            bar.set_postfix_str(f"{report.percent:.0f}% of all, ends {end.strftime(form)}", refresh=False)
            bar.update(round(count, 2) - bar.n)

        count = done
        before, _current.part = _current.part, lambda share: reached(count + min(share, 1.0))
        try:
            for index, item in enumerate(items):
                count = done + index
                yield item
                reached(count + 1)
        finally:
            _current.part = before


def part_done(share: float) -> None:
    """Tells how much of the current step is done, where steps are long.

    Args:
        share: From 0 to 1.
    """
    if _current.part is not None:
        _current.part(share)
