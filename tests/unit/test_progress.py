"""How far a run is: percent and end over all phases, and what listeners hear of it."""

import pytest

from layerbits import progress as module
from layerbits.progress import listening, part_done, planned, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by hand, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def work(clock, items, what, seconds):
    for _ in progress(items, what):
        clock(seconds)


def test_percent_and_end_are_of_all_planned_phases(clock):
    heard = []
    with listening(heard.append), planned(calibrating=(4, 1.0), scoring=(4, 5.0)):
        work(clock, range(4), "calibrating", 10)
        work(clock, range(4), "scoring", 50)
    assert [r.steps for r in heard] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [round(r.percent, 1) for r in heard[:5]] == [4.2, 8.3, 12.5, 16.7, 37.5]
    assert [round(r.eta_seconds) for r in heard] == [230, 220, 210, 200, 150, 100, 50, 0]
    assert heard[4].phase == "scoring"


def test_nobody_hears_more_often_than_every_ten_seconds(clock):
    heard = []
    with listening(heard.append):
        work(clock, range(100), "scoring", 1)
    assert len(heard) == 10


def test_a_run_of_seconds_reports_nothing(clock):
    heard = []
    with listening(heard.append):
        work(clock, range(3), "scoring", 2)
    assert heard == []


def test_steps_of_an_earlier_start_took_no_time(clock):
    heard = []
    with listening(heard.append):
        for _ in progress(range(2), "scoring", done=98):
            clock(10)
    assert [(r.steps, r.percent, r.eta_seconds) for r in heard] == [(99, 99.0, 10.0), (100, 100.0, 0.0)]


def test_a_slow_first_step_does_not_spoil_the_estimate(clock):
    heard = []
    with listening(heard.append):
        for index in progress(range(10), "scoring"):
            clock(100 if index == 0 else 10)
    assert [round(r.eta_seconds) for r in heard[:3]] == [900, 80, 70]


def test_parts_of_a_long_step_count(clock):
    heard = []
    with listening(heard.append):
        for _ in progress(range(2), "scoring"):
            for share in (0.25, 0.5, 0.75):
                clock(25)
                part_done(share)
            clock(25)
    assert [r.percent for r in heard] == [12.5, 25.0, 37.5, 50.0, 62.5, 75.0, 87.5, 100.0]
    assert [round(r.eta_seconds) for r in heard[:3]] == [175, 150, 125]


def test_only_the_innermost_listener_hears(clock):
    outer, inner = [], []
    with listening(outer.append):
        with listening(inner.append):
            work(clock, range(2), "scoring", 20)
        work(clock, range(1), "scoring", 20)
    assert (len(outer), len(inner)) == (1, 2)


def test_the_terminal_shows_percent_and_end(clock, capsys):
    work(clock, range(2), "scoring", 30)
    shown = capsys.readouterr().err
    assert "100% of all, ends " in shown


def test_a_phase_that_was_not_needed_does_not_count(clock):
    heard = []
    with listening(heard.append), planned(calibrating=(4, 1.0), scoring=(2, 5.0)):
        work(clock, range(2), "scoring", 50)
    assert [(r.steps, r.percent) for r in heard] == [(1, 50.0), (2, 100.0)]
