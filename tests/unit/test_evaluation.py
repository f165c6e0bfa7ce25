"""An evaluation as verdicts, metrics, tables and Markdown, from answers made by hand."""

import json
import math
from dataclasses import replace

import pytest

from layerbits.answers.evaluation import Answer, Evaluated, Evaluation, TaskAnswers, documents, read_evaluation
from layerbits.answers.report import markdown, table, tags, write_evaluation
from layerbits.errors import UserError
from layerbits.history.evaluated import rows_of
from layerbits.history.source import RawRun
from layerbits.results.result import ModelInfo

MODEL = ModelInfo("tiny", "tiny", "abc", "float32", 2)


def answers(right, odds=None, task="quiz"):
    made = tuple(
        Answer(i, f"question {i}", "yes", "yes" if r else "no", r, None if odds is None else odds[i], f"hash{i}")
        for i, r in enumerate(right)
    )
    return TaskAnswers(task, "acc,none", made)


def evaluated(name, tasks, **changes):
    made = Evaluated(name, f"digest of {name}", None, 5.0, 0.1, 0.12, 0.01, {t.task: t for t in tasks})
    return replace(made, **changes)


def evaluation(*schemes, before=None):
    before = before or [answers([True] * 30 + [False] * 10, [1.0] * 40)]
    return Evaluation(MODEL, ("run",), "everyday", {t.task: t for t in before}, schemes, 1e-9, None)


def damaged():
    """Ten of forty answers lost, none won; log-odds half a nat lower."""
    return evaluated("low", [answers([True] * 20 + [False] * 20, [0.5] * 40)])


def test_a_verdict_for_each_task_and_scheme():
    found = evaluation(damaged(), evaluated("same", [answers([True] * 30 + [False] * 10, [1.0] * 40)])).verdicts()
    assert (found["quiz", "low"].paired.lost, found["quiz", "low"].paired.won) == (10, 0)
    assert found["quiz", "low"].kind == "worse"
    assert found["quiz", "low"].log_odds.value == pytest.approx(-0.5)
    assert found["quiz", "same"].kind == "no difference seen"


def test_generated_answers_have_no_log_odds():
    after = evaluated("low", [answers([True] * 40)])
    assert evaluation(after).verdicts()["quiz", "low"].log_odds is None


def test_metrics_are_named_by_task_and_scheme_and_finite():
    found = evaluation(evaluated("low", [answers([False] * 40, [0.5] * 40)], predicted_kl=math.nan)).metrics()
    assert found["eval/quiz/unquantized/accuracy"] == 0.75
    assert found["eval/quiz/low/accuracy"] == 0
    assert found["eval/quiz/low/difference"] == -0.75
    assert found["eval/quiz/low/lost"] == 30
    assert found["eval/quiz/documents"] == 40
    assert "eval/quiz/low/predicted_kl" not in found
    assert all(map(math.isfinite, found.values()))


def test_history_reads_the_metrics_back():
    result = evaluation(damaged())
    info = {"run_id": "a" * 32, "run_name": "evaluation of x", "start_time": 0}
    run = RawRun(info, {"eff.model": "tiny"}, result.metrics(), {"mlflow.layerbits.scheme.low": "d"})
    low, itself = rows_of(run)
    assert (low["task"], low["scheme"], low["digest"], low["documents"]) == ("quiz", "low", "d", 40)
    assert low["difference"] == -0.25
    assert (itself["scheme"], itself["accuracy"]) == ("unquantized", 0.75)


def test_the_table_has_changed_answers_first_and_opens_in_the_ui():
    result = evaluation(damaged())
    rows = documents(result, result.schemes[0])
    assert [row["change"] for row in rows] == ["lost"] * 10 + [""] * 30
    told = json.loads(table(result, result.schemes[0]))
    assert len(told["data"]) == 40
    assert told["columns"][:3] == ["task", "document", "change"]
    assert tags(result)["mlflow.layerbits.verdict.low"].startswith("quiz: worse by ")
    assert json.loads(tags(result)["mlflow.loggedArtifacts"]) == [{"path": "documents/low.json", "type": "table"}]


def test_the_report_says_verdicts_and_cut_answers():
    after = evaluated("low", [replace(answers([True] * 20 + [False] * 20), cut=3)])
    text = markdown(evaluation(after, before=[answers([True] * 30 + [False] * 10)]))
    assert "| low | 5.000 | 0.12 ± 0.01 | 50.0% | 10 / 0 |" in text
    assert "worse by " in text
    assert "only at the limit of tokens: low 3." in text
    assert "log-odds (nats)" not in text


def test_predicted_flips_are_listed_beside_the_measured_ones():
    before = [answers([True, True, False, False], [1.0, 1.0, -1.0, -1.0])]
    after = [answers([False, True, False, True], [-0.5, 0.5, -2.0, 1.0])]
    scheme = evaluated("low", after, predicted={"quiz": (-1.5, -1.5, 0.0, 1.5)})
    found = evaluation(scheme, before=before)
    assert found.predicted_flips("quiz", scheme) == (3, 2, 2)
    assert "Predicted changes of their sign that came true: low 2 of 3 (2 measured)." in markdown(found)
    rows = {row["document"]: row for row in documents(found, scheme)}
    assert [rows[i]["predicted_log_odds_change"] for i in range(4)] == [-1.5, -1.5, 0.0, 1.5]
    assert "predicted_log_odds_change" not in documents(evaluation(damaged()), damaged())[0]


def test_the_folder_holds_all_of_it(tmp_path):
    folder = write_evaluation(evaluation(damaged()), tmp_path)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {"evaluation.json", "evaluation.md", "documents/low.json", "figures/answers.png"}
    plain = json.loads((folder / "evaluation.json").read_text())
    (verdict,) = plain["verdicts"]
    assert (verdict["task"], verdict["scheme"], verdict["verdict"]) == ("quiz", "low", "worse")
    assert read_evaluation(folder / "evaluation.json") == evaluation(damaged())


def test_what_is_no_evaluation_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no evaluation\.json"):
        read_evaluation(tmp_path / "x.json")
