"""The tasks that come with LayerBits through the harness, put to models without weights."""

import json
import random

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval.api.model import LM

from layerbits.answers.harness import Harness, choice_log_odds, own_tasks
from layerbits.answers.rows import main, questions
from layerbits.answers.settings import TaskSettings
from layerbits.inputs.captions import load_captions, read_questions

HELD_OUT = load_captions("everyday", "small").held_out


class Guesser(LM):
    """Guesses; given answers it says those to the prompts that it knows."""

    max_length = 100_000

    def __init__(self, known=None):
        super().__init__()
        self.known = known or {}

    def tokenizer(self, texts, add_special_tokens=True):
        return {"input_ids": [text.split() for text in texts]}

    def loglikelihood(self, requests, disable_tqdm=False):
        draw = random.Random(0)
        return [(0.0 if self.known.get(r.args[0]) == r.args[1] else draw.uniform(-9, -5), False) for r in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return [self.known.get(r.args[0], "lol") for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.fixture(scope="module")
def harness():
    return Harness(TaskSettings(tuple(own_tasks()), limit=12), HELD_OUT)


@pytest.fixture(scope="module")
def right(harness):
    """Prompt → right answer, of all tasks."""
    for task in harness.tasks.values():
        harness.build(task)
    known = {p: a for task in harness.tasks.values() for p, a in questions(task)}
    programs = harness.tasks["humaneval_offline"].instances
    return known | {instance.args[0]: instance.doc["canonical_solution"] for instance in programs}


def test_one_that_knows_the_answers_has_all_of_them_right(harness, right):
    found = harness.answers(Guesser(right))
    assert {name: answers.accuracy for name, answers in found.items()} == dict.fromkeys(own_tasks(), 1.0)


def test_one_that_guesses_is_wrong_and_every_answer_has_its_prompt(harness):
    found = harness.answers(Guesser())
    assert all(answers.accuracy < 0.7 for answers in found.values())
    assert all(len(answers.answers) == 12 for answers in found.values())


class Endless(Guesser):
    """Writes until it may write no more."""

    def generate_until(self, requests, disable_tqdm=False):
        return ["on " * r.args[1].get("max_gen_toks", 256) for r in requests]


def test_answers_that_never_end_are_counted(harness):
    found = harness.answers(Endless())
    written = {name for name, task in harness.tasks.items() if task.OUTPUT_TYPE == "generate_until"}
    assert {name: answers.cut for name, answers in found.items()} == {
        name: 12 if name in written else 0 for name in own_tasks()
    }


def test_the_prompts_are_the_same_every_time(harness):
    first, second = (harness.answers(Guesser()) for _ in range(2))
    for name in own_tasks():
        assert [a.prompt_hash for a in first[name].answers] == [a.prompt_hash for a in second[name].answers]


def test_questions_differ_from_each_other_and_from_the_examples(harness):
    for name in ("sums", "family", "letters", "sums_written", "backward", "reordering"):
        asked = [doc["question"] for doc in harness.tasks[name].eval_docs]
        shown = {doc["question"] for doc in harness.tasks[name].dataset["train"]}
        assert len(set(asked)) == len(asked) > 800
        assert not shown & set(asked)


def test_log_odds_are_of_the_right_choice_against_all_others():
    assert choice_log_odds([-1.0, -1.0], 0) == pytest.approx(0)
    assert choice_log_odds([-1.0, -2.0, -2.0], 0) == pytest.approx(1 - 0.6931471805599453)


def test_rows_of_a_task_are_questions_to_score_on(tmp_path, capsys):
    assert main(["family", str(tmp_path / "rows.jsonl"), "--first", "990"]) == 0
    rows = read_questions((tmp_path / "rows.jsonl").read_bytes(), "rows.jsonl")
    assert len(rows) == 10
    assert all(row[: row.answer].endswith("Answer:") and row[row.answer :].startswith(" ") for row in rows)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["prompt"].startswith("Question: ")
    assert main(["family", str(tmp_path / "none.jsonl"), "--first", "1000"]) == 2
    assert "has no document from 1000 on" in capsys.readouterr().err
