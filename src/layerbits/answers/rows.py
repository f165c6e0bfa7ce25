"""Questions of a task as rows to score layers on: ``dataset=task dataset.path=FILE``.

python -m layerbits.answers.rows cloze rows.jsonl --first 128
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.answers.settings import TaskSettings, check_installed
from layerbits.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def questions(task: Task) -> list[tuple[str, str]]:
    """Prompt and right answer of each document, as the harness puts them, after its requests were built.

    Raises:
        UserError: A document has several right answers.
    """
    pairs = []
    for instance in task.instances:
        target = task.doc_to_target(instance.doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            if not isinstance(target, int):
                raise UserError(f"task {task.config.task} has several right answers to a question; use another task")
            if instance.idx != target:
                continue
            prompt, answer = instance.args[:2]
        elif task.OUTPUT_TYPE == "loglikelihood":
            prompt, answer = instance.args[:2]
        else:
            prompt, answer = instance.args[0], f"{task.config.target_delimiter}{target}"
        pairs.append((str(prompt), str(answer)))
    return pairs


def write_rows(name: str, path: Path, first: int, task_path: Path | None, dataset: str, captions: str | None) -> int:
    """Writes the questions from a document on.

    Args:
        name: The task.
        path: The file.
        first: Number of the first document: leave out those that will be asked.
        task_path: Folder of further tasks.
        dataset: Captions of ``cloze``.
        captions: Their file, where ``dataset`` needs one.

    Returns:
        How many.

    Raises:
        UserError: The task cannot be had, or has no document from there on.
    """
    check_installed()
    from layerbits.answers.harness import Harness
    from layerbits.inputs.captions import load_captions
    from layerbits.inputs.datasets import held_out_captions

    held_out = held_out_captions(load_captions(dataset, "small", captions).held_out)
    harness = Harness(TaskSettings((name,), task_path), held_out)
    rows = []
    for task in harness.tasks.values():
        harness.build(task)
        rows += questions(task)[first:]
    if not rows:
        raise UserError(f"task {name} has no document from {first} on; use a smaller --first")
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows), encoding="utf-8")
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake ends it with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("path", type=Path)
    parser.add_argument("--first", type=int, default=0, help="first document; those before can be asked")
    parser.add_argument("--task-path", type=Path)
    parser.add_argument("--dataset", default="everyday", help="captions of cloze")
    parser.add_argument("--captions", help="their file, for datasets that need one")
    given = parser.parse_args(arguments)
    try:
        count = write_rows(given.task, given.path, given.first, given.task_path, given.dataset, given.captions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} questions: {given.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
