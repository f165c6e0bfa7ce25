import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerbits.schemes.solver import TOLERANCE
from layerbits.schemes.within import best_within


def brute_force(scores, costs, budgets):
    """Least score of all combinations that keep every budget; infinite where none does."""
    groups, choices = scores.shape
    best = np.inf
    for at in itertools.product(range(choices), repeat=groups):
        picked = [cost[np.arange(groups), at].sum() for cost in costs]
        if all(spent <= budget + 1e-7 for spent, budget in zip(picked, budgets, strict=True)):
            best = min(best, scores[np.arange(groups), at].sum())
    return best


def total(values, at):
    """Sum of the picked values."""
    return values[np.arange(len(at)), at].sum()


@st.composite
def problems(draw, budgets):
    groups, choices = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    value = st.one_of(st.floats(1e-9, 1e-2), st.just(np.inf))
    size = groups * choices
    scores = np.array(draw(st.lists(value, min_size=size, max_size=size))).reshape(groups, choices)
    scores[:, -1] = 0.0
    # every budget has an order of its own: what is small in one may be large in another
    numbers = st.lists(st.integers(1, 64).map(lambda n: n / 8), min_size=size, max_size=size)
    costs = [np.array(draw(numbers)).reshape(groups, choices) for _ in range(budgets)]
    allowed = [np.where(np.isfinite(scores), c, np.nan) for c in costs]
    ends = [(np.nanmin(c, axis=1).sum(), np.nanmax(c, axis=1).sum()) for c in allowed]
    # a quarter of an eighth beyond: no sum is on the edge
    shares = draw(st.lists(st.floats(-0.1, 1.0), min_size=budgets, max_size=budgets))
    return scores, costs, [round((a + s * (b - a)) * 8) / 8 + 1 / 32 for (a, b), s in zip(ends, shares, strict=True)]


@settings(deadline=None, max_examples=250)
@given(st.integers(1, 3).flatmap(problems))
def test_no_combination_that_keeps_the_budgets_is_better(drawn):
    scores, costs, budgets = drawn
    best, found = brute_force(scores, costs, budgets), best_within(scores, costs, budgets)
    if found is None:
        assert np.isinf(best)
        return
    assert total(scores, found) <= best * (1 + 1e-9)
    assert all(total(cost, found) <= budget + TOLERANCE for cost, budget in zip(costs, budgets, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_two_budgets_are_solved_exactly_where_groups_are_too_many_to_try_all(seed):
    rng = np.random.default_rng(seed)
    groups = 30
    scores = np.hstack([rng.lognormal(-6, 1.5, (groups, 1)) * [9, 6, 1.1], np.zeros((groups, 1))])
    first, second = (rng.integers(1, 9, (groups, 4)) + np.array([0, 2, 5, 8]) for _ in range(2))
    caps = int(0.55 * first[:, -1].sum()), int(0.6 * second[:, -1].sum())
    least = np.full((caps[0] + 1, caps[1] + 1), np.inf)  # by what both have been spent so far
    least[0, 0] = 0.0
    for g in range(groups):
        grown = np.full_like(least, np.inf)
        for k in range(4):
            a, b = first[g, k], second[g, k]
            part = least[: caps[0] + 1 - a, : caps[1] + 1 - b] + scores[g, k]
            grown[a:, b:] = np.minimum(grown[a:, b:], part)
        least = grown
    found = best_within(scores, [first.astype(float), second.astype(float)], caps)
    assert total(scores, found) == pytest.approx(least.min(), rel=1e-9)


def test_budgets_that_exclude_each_other_have_no_choice():
    scores = np.array([[1.0, 0.0]])
    assert best_within(scores, [np.array([[1.0, 5.0]]), np.array([[5.0, 1.0]])], [2.0, 2.0]) is None


def test_a_budget_below_its_least_has_no_choice():
    assert best_within(np.array([[1.0, 0.0]]), [np.array([[4.0, 16.0]])], [3.0]) is None
