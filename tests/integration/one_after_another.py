"""Entry scripts one after the other in one process, for :func:`tests.integration.entries.start_together`.

Its command line: for each script its name and its arguments, and ``--`` between two of them.
"""

import runpy
import sys
import traceback
from itertools import groupby

from hydra.core.global_hydra import GlobalHydra

from layerbits.failures import failed

END = "this script ended with"


def run(script, *arguments):
    """Runs a script and says on both streams how it ended."""
    sys.argv = [f"experiments/{script}.py", *arguments]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    except Exception:
        traceback.print_exc()
        status = 1
    GlobalHydra.instance().clear()
    failed.clear()
    for stream in (sys.stdout, sys.stderr):
        print(END, status, file=stream, flush=True)


if __name__ == "__main__":
    for between, command in groupby(sys.argv[1:], "--".__eq__):
        if not between:
            run(*command)
