"""Every family of ``docs/models.md``: one pass against ModelOpt's own search, and whether the table is current."""

import re
from functools import cache

import pytest

from layerbits.results.result import KINDS
from layerbits.scoring.job import Scores
from tests import families_table
from tests.families import FAMILIES
from tests.families_table import DOCUMENT, TOLERANCE, table

tried = cache(families_table.tried)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_stock_or_the_table_says_why_not(family):
    found = tried(family)
    if found.difference is None:
        assert any(found.remarks())
    else:
        assert found.difference <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_a_kind(family):
    for scores in (tried(family).one, tried(family).reference):
        if isinstance(scores, Scores):
            assert {g.kind for g in scores.groups} <= {*KINDS} - {"other"}
            assert len({g.key for g in scores.groups}) == len(scores.groups)
            assert all(re.fullmatch(r"[\w.-]+", g.key) for g in scores.groups)  # part of a metric's name in MLflow


def test_the_table_is_current():
    made = table([tried(family) for family in FAMILIES])
    assert made in DOCUMENT.read_text(), "run python -m tests.families_table"
