"""The ``layerbits`` command: what it prints of given answers, and what it says of wrong command lines."""

import csv
import io
import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from layerbits import cli, history
from layerbits.history import Comparison

RUNS = pd.DataFrame(
    {
        "run_id": ["a1", "b2"],
        "model": ["tiny", "tiny"],
        "quant_pair": ["wint8_afp16", "wfp8_afp8"],
        "granularity": ["default", "w_per_tensor"],
        "dataset_size": ["small", None],
        "effective_bits": [11.5, math.nan],
        "predicted_kl_sum": [0.1 + 0.2, math.nan],
        "score_sum": [1e-12, 2.0],
        "start_time": pd.to_datetime(["2026-05-01T10:20:30Z", "2026-05-02T00:00:00Z"]),
        "seed": pd.array([7, None], dtype="Int64"),
    }
)
MOVERS = pd.DataFrame({"layer": ["B00.o", "B01.o"], "a": [1.0, 2.0], "b": [2.0, math.nan], "moved": [1, -1]})
SIDE_BY_SIDE = Comparison(
    a="a1",
    b="b2",
    by="score",
    comparable=True,
    reasons=(),
    notes=("engine: stock and onepass",),
    groups=2,
    spearman=0.5,
    kendall=1 / 3,
    overlap={5: 2},
    ratio=math.nan,
    movers=MOVERS,
)


def run(*arguments):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    return exit.value.code


@pytest.fixture
def asked(monkeypatch):
    """What ``history.runs`` was asked; it answers with RUNS."""
    questions = []
    monkeypatch.setattr(history, "runs", lambda **question: questions.append(question) or RUNS)
    return questions


def test_filters_reach_the_history(asked, capsys):
    options = ["--experiment", "mine", "--model", "tiny", "--pair", "wfp8_afp8", "--granularity", "default"]
    options += ["--since", "2026-05-01", "--where", "tags.x = 'y'", "--outcome", "any", "--refresh"]
    assert run("history", *options, "--tracking-uri", "sqlite:///x.db") == 0
    assert asked == [
        {
            "experiment": "mine",
            "model": "tiny",
            "pair": "wfp8_afp8",
            "granularity": "default",
            "since": "2026-05-01",
            "where": "tags.x = 'y'",
            "tracking_uri": "sqlite:///x.db",
            "refresh": True,
            "outcome": None,
        }
    ]


def test_the_table_has_the_main_columns_and_short_numbers(asked, capsys):
    assert run("history") == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == [*cli._RUN_COLUMNS]
    assert " ".join(first.split()) == "a1 tiny wint8_afp16 default small 11.5 0.3 1e-12 2026-05-01 10:20"
    assert second.split()[4:7] == ["–", "–", "–"]


def test_csv_has_every_column_and_every_digit(asked, capsys):
    assert run("history", "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == list(RUNS.columns)
    assert float(rows[0]["predicted_kl_sum"]) == 0.1 + 0.2
    assert rows[1]["effective_bits"] == ""


def test_json_has_every_column_every_digit_and_null(asked, capsys):
    assert run("history", "--format", "json") == 0
    first, second = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert list(first) == list(RUNS.columns)
    assert (first["predicted_kl_sum"], first["seed"]) == (0.1 + 0.2, 7)
    assert first["start_time"] == "2026-05-01T10:20:30+00:00"
    assert (second["effective_bits"], second["dataset_size"], second["seed"]) == (None, None, None)


@pytest.mark.parametrize(("form", "said"), [("table", "nothing found"), ("json", "[]"), ("csv", "run_id,model")])
def test_no_runs_are_said_in_every_form(monkeypatch, capsys, form, said):
    monkeypatch.setattr(history, "runs", lambda **_: RUNS[:0])
    assert run("history", "--format", form) == 0
    assert capsys.readouterr().out.startswith(said)


def test_compare_as_a_table_says_how_close_they_are(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(history, "compare", lambda *a, **k: asked.append((a, k)) or SIDE_BY_SIDE)
    assert run("compare", "a1", "b2", "--by", "score", "--tracking-uri", "sqlite:///x.db") == 0
    assert asked == [(("a1", "b2", "score"), {"tracking_uri": "sqlite:///x.db"})]
    said = capsys.readouterr()
    assert said.out.startswith("2 groups by score: Spearman 0.500, Kendall 0.333\n2 of the top 5 in both\n")
    assert "sum of b" not in said.out
    assert "B01.o" in said.out
    assert said.err == "note: engine: stock and onepass\n"


def test_compare_as_json_is_everything_and_strict(monkeypatch, capsys):
    monkeypatch.setattr(history, "compare", lambda *_, **__: SIDE_BY_SIDE)
    assert run("compare", "a1", "b2", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (found["kendall"], found["ratio"], found["overlap"]) == (1 / 3, None, {"5": 2})
    assert found["movers"][1] == {"layer": "B01.o", "a": 2.0, "b": None, "moved": -1}


def test_compare_as_csv_is_the_groups(monkeypatch, capsys):
    monkeypatch.setattr(history, "compare", lambda *_, **__: SIDE_BY_SIDE)
    assert run("compare", "a1", "b2", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines() == ["layer,a,b,moved", "B00.o,1.0,2.0,1", "B01.o,2.0,,-1"]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_runs_that_do_not_compare_are_status_1(monkeypatch, capsys, form):
    nan = dict.fromkeys(("spearman", "kendall", "ratio"), math.nan)
    not_so = replace(SIDE_BY_SIDE, comparable=False, reasons=("seq len: 128 and 256",), movers=MOVERS[:0], **nan)
    monkeypatch.setattr(history, "compare", lambda *_, **__: not_so)
    assert run("compare", "a1", "b2", "--format", form) == 1
    said = capsys.readouterr()
    if form == "json":
        assert json.loads(said.out)["reasons"] == ["seq len: 128 and 256"]
    else:
        assert "not comparable by score: seq len: 128 and 256" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("histroy",), "histroy"),
        (("history", "--paar", "x"), "--paar"),
        (("history", "--format", "xml"), "xml"),
        (("compare", "a1"), "RUN"),
        (("compare", "a1", "b2", "--by", "colour"), "colour"),
        (("push",), "DIR"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, words):
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert line.endswith("--help")


def test_warnings_are_a_line_without_the_code_that_raised_them(monkeypatch, capsys):
    def runs(**_):
        import warnings

        warnings.warn("3 runs left out", stacklevel=2)
        return RUNS

    monkeypatch.setattr(history, "runs", runs)
    assert run("history") == 0
    assert capsys.readouterr().err == "warning: 3 runs left out\n"
