"""What a command does to its own process before anything else: text in UTF-8, and a user that has a name."""

from __future__ import annotations

import getpass
import io
import locale
import os
import sys


def prepare() -> None:
    """Makes the process of a command independent of the locale, the terminal and the list of users.

    May start the process again, in Python's UTF-8 mode: paths, arguments and files have been decoded by then.
    """
    _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a name must not end a run
    _name_user()


def _use_utf8() -> None:
    if sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8"):
        return
    if sys.flags.ignore_environment or "utf8" in sys._xoptions:  # said so on Python's command line
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts as well
    os.execv(sys.executable, sys.orig_argv)


def _name_user() -> None:
    """MLflow asks for the user's name, which a container's user without an entry in the list of users has not."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
