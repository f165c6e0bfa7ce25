"""Every family of ``docs/models.md``: every mode against plain autograd, stock beside it, and the table."""

import re
from functools import cache

import pytest

from layerbits.results.result import KINDS
from layerbits.scoring.job import Scores
from tests import families_table
from tests.families import FAMILIES
from tests.families_table import DOCUMENT, MODES, TOLERANCE, table

tried = cache(families_table.tried)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_equals_plain_autograd(family):
    found = tried(family)
    assert {mode: found.off[mode] for mode in MODES} == {mode: pytest.approx(0, abs=1e-5) for mode in MODES}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_equals_plain_autograd_or_its_scores_or_the_table_say_why_not(family):
    found = tried(family)
    if isinstance(found.reference, str):
        assert any(found.remarks())
    elif found.off["stock"] > 1e-5:
        assert any("engine=stock is wrong for" in note for note in found.reference.notes)
    else:
        assert found.difference <= TOLERANCE
        assert found.reference.notes == ()


BESIDE = {"gemma3n_text", "gemma4_text", "zamba2"}
"""Families with linears that belong to no attention, mixer or MLP: what enters layers, or leads into a shared block."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_a_kind(family):
    known = {*KINDS} if family in BESIDE else {*KINDS} - {"other"}
    for scores in (tried(family).one, tried(family).reference):
        if isinstance(scores, Scores):
            assert {g.kind for g in scores.groups} <= known
            assert len({g.key for g in scores.groups}) == len(scores.groups)
            assert all(re.fullmatch(r"[\w.-]+", g.key) for g in scores.groups)  # part of a metric's name in MLflow


def test_the_table_is_current():
    made = table([tried(family) for family in FAMILIES])
    assert made in DOCUMENT.read_text(), "run python -m tests.families_table"
