"""Rank stability of logged runs from the command line, with a SQLite store."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layerbits import cli, history
from layerbits.report import write_report
from layerbits.results.bootstrap import with_intervals
from layerbits.schemes.budget_kinds import Counted
from layerbits.schemes.sizes import GIB, Load, Sizes, Stored
from layerbits.tracking import push

from .tracking_support import small_result, write_folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs of one truth on 16 and on 64 captions, and one by an engine that keeps no samples; ids by size."""
    folder = tmp_path_factory.mktemp("stability")
    uri = f"sqlite:///{folder}/mlflow.db"
    ids = {}
    rng = np.random.default_rng(0)
    base = small_result(blocks=6)
    for captions in (16, 64):
        shares = rng.gamma(1.5, 1 / 1.5, size=(captions, *base.scores.shape)) * base.predicted_kl / captions
        data = replace(base.calibration, size=str(captions), score_samples=captions)
        fields = {"predicted_kl": shares.sum(axis=0), "sample_kl": shares, "sample_tokens": np.full(captions, 12)}
        made = with_intervals(replace(base, calibration=data, **fields))
        write_report(made, folder / str(captions))
        ids[captions] = push(folder / str(captions), uri, root=folder)
    ids["none"] = push(write_folder(small_result(blocks=6, seed=5), folder / "none"), uri, root=folder)
    return uri, ids


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, capsys.readouterr()


def test_runs_are_compared_in_pairs_with_intervals(store, capsys):
    uri, ids = store
    code, told = command(capsys, "stability", ids[16], ids[64], "--tracking-uri", uri, "--format", "json")
    (row,) = json.loads(told.out)
    assert code == 0
    assert (row["a"], row["b"]) == (ids[16], ids[64])
    assert row["spearman_low"] < row["spearman"] <= row["spearman_high"] <= 1
    assert row["groups"] == 23  # one score is infinite
    assert row["differs"] == "size: 16 and 64; scored captions: 16 and 64"


def test_filters_find_the_runs(store, capsys):
    uri, _ = store
    code, told = command(capsys, "stability", "--pair", "wint8_afp16", "--tracking-uri", uri, "--format", "csv")
    assert code == 0
    assert len(told.out.splitlines()) == 1 + 3


def test_a_run_without_samples_is_told_without_an_interval(store, capsys):
    uri, ids = store
    code, told = command(capsys, "stability", ids["none"], ids[16], "--tracking-uri", uri)
    assert code == 0
    title, row = told.out.splitlines()
    assert title.split()[:5] == ["a", "b", "groups", "spearman", "kendall"]
    assert "(" not in row


def test_filters_that_find_one_run_or_none_say_so(store, capsys):
    uri, ids = store
    for arguments in ([ids[16]], ["--pair", "wfp8_afp8"]):
        code, told = command(capsys, "stability", *arguments, "--tracking-uri", uri)
        assert code == 2
        assert told.err.splitlines()[-1].startswith("error: rank stability compares runs")


def test_schemes_of_budgets_of_any_kind_are_drawn_again(store, capsys, monkeypatch):
    uri, ids = store
    asked = []

    def measuring(*arguments):
        def measure(source, counted):
            asked.append((*arguments, counted))
            weights = np.array([g.weights for g in source.groups], dtype=float)[:, None]
            names = tuple(c.name for c in source.candidates)
            stored = Stored(0, weights * np.array([[source.candidates[0].bits / 8, 2.0]]), frozenset(names))
            return replace(source, sizes=Sizes(names, {"compressed-tensors": stored}, 0, Load()))

        return measure

    monkeypatch.setattr("layerbits.serving.find_costs.measuring", measuring)
    code, bits = command(capsys, "stability", ids[64], "--bits", "10", "--tracking-uri", uri)
    assert (code, asked) == (0, [])
    assert bits.out.splitlines()[1].split()[0] == "bits_10"
    gib = sum(g.weights for g in small_result(blocks=6).groups) * 10 / 8 / GIB
    given = ("--gib", f"{gib!r}", "--context", "64", "--target", "h200", "--tracking-uri", uri)
    code, memory = command(capsys, "stability", ids[64], *given)
    assert (code, asked) == (0, [(uri, Path.cwd(), "h200", Counted(Load(64, 1)))])
    assert memory.out.splitlines()[1].split()[1:] == bits.out.splitlines()[1].split()[1:]  # the same budget
    code, both = command(capsys, "stability", ids[64], *given, "--bits", "9,12", "--format", "json")
    assert code == 0
    assert {row["scheme"] for row in json.loads(both.out)} == {f"bits_9_gib_{gib:g}", f"bits_12_gib_{gib:g}"}
    code, told = command(capsys, "stability", ids[64], "--ms", "6", "--tracking-uri", uri)
    assert (code, told.err.splitlines()[-1][:28]) == (2, "error: budget_ms needs costs")


def test_history_has_the_intervals_of_the_runs(store):
    uri, ids = store
    frame = history.scores([ids[64]], tracking_uri=uri)
    known = frame["predicted_kl"].notna()
    assert known.sum() == 23
    assert (frame["low"][known] <= frame["predicted_kl"][known]).all()
    assert (frame["rank_low"][known] <= frame["rank_high"][known]).all()
    assert history.result(ids[64], tracking_uri=uri).intervals.captions == 64
    assert history.scores([ids["none"]], tracking_uri=uri)["low"].isna().all()
