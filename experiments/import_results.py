"""Logs the results of earlier tools as runs; what was imported before stays as it is.

python experiments/import_results.py path=FOLDER
"""

from layerbits.commands.import_results import import_results
from layerbits.entry import start

if __name__ == "__main__":
    start(import_results, __file__, "import_run")
