"""Reports of a result: Markdown for people, JSON for programs, a note for the run page (no torch, no MLflow).

:func:`json_report` gathers what is reported; the Markdown and the note are renderings of it.
"""

from layerbits.report.content import json_report
from layerbits.report.files import rebuild, write_report
from layerbits.report.markdown import markdown_report, note

__all__ = ["json_report", "markdown_report", "note", "rebuild", "write_report"]
