"""What all tests share.

A suite that is stopped (SIGTERM) ends the servers that it started, as Ctrl-C does. Garbage collection leaves alone what
was imported.
"""

import gc
import os
import signal
import sys
import threading

import psutil
import pytest
from xdist.workermanage import NodeManager

NodeManager.EXIT_TIMEOUT = 60  # seconds that workers have to end their servers; xdist's 10 are few on a loaded machine


def pytest_configure():
    """Makes SIGTERM an exception, so that fixtures are torn down; by default it ends Python at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stopper(os.getpid()))
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; jobs under test inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)


_MANY = 100
"""Modules that a test may import before they are taken out of garbage collection, too."""

_frozen = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports without garbage collection, which takes a fifth of the time that importing takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Takes what is imported by now out of garbage collection.

    A full collection goes through all of it, in 0.4 s; ModelOpt's search asks for two.
    """
    _freeze()


def pytest_runtest_logfinish():
    """Takes what a test has imported out as well: ModelOpt and transformers load most of theirs when they are used."""
    if len(sys.modules) > _frozen + _MANY:
        _freeze()


_count = gc.get_freeze_count


def _freeze():
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)
    _keep_count()


def _keep_count():
    """Counts what is frozen once: each pass asks for it, and Python goes through 700,000 objects to count them."""
    known = _count()
    gc.get_freeze_count = lambda: known


@pytest.fixture
def nothing_frozen():
    """Nothing is kept out of garbage collection, as in a run."""
    gc.unfreeze()
    gc.get_freeze_count = _count
    yield
    gc.freeze()
    _keep_count()


def _stopper(owner):
    def stop(number, _frame):
        if os.getpid() != owner:  # a fork of ours: it has nothing to tear down
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # `timeout` signals a whole group, and we pass it on
        if "PYTEST_XDIST_WORKER" not in os.environ:
            for worker in psutil.Process().children():
                worker.terminate()
        raise KeyboardInterrupt("stopped by SIGTERM")  # no Exception, which a job under test would report and go on

    return stop
