import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerbits.errors import UserError
from layerbits.schemes import solver

BITS = {"a": 4.25, "b": 4.5, "c": 8.0, "d": 8.5}


def solve(scores, bits, weights, budget):
    """The solution of one budget."""
    return solver.pareto(scores, bits, weights, [budget])[0]


def brute_force(stated, budget):
    """Least score of all combinations that fit, choice by choice."""
    groups, choices = stated.scores.shape
    best = np.inf
    for at in itertools.product(range(choices), repeat=groups):
        if sum(stated.bits[g, c] for g, c in enumerate(at)) <= budget + 1e-7:
            best = min(best, sum(stated.scores[g, c] for g, c in enumerate(at)))
    return best


@st.composite
def problems(draw):
    groups, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    value = st.one_of(st.floats(1e-9, 1e-2), st.just(float("nan")))
    scores = draw(st.lists(st.lists(value, min_size=candidates, max_size=candidates), min_size=groups, max_size=groups))
    bits = draw(st.lists(st.sampled_from([*BITS.values()]), min_size=candidates, max_size=candidates))
    weights = draw(st.lists(st.integers(1, 40).map(lambda n: n * 1024), min_size=groups, max_size=groups))
    return np.array(scores), dict(zip("abc", bits, strict=False)), weights, draw(st.floats(0.0, 1.0))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_the_choice_is_as_good_as_the_best_of_all_combinations(drawn):
    scores, bits, weights, share = drawn
    stated = solver.problem(scores, bits, weights)
    budget = stated.floor + share * (16 - stated.floor)
    found = solve(scores, bits, weights, budget)
    best = brute_force(stated, budget)
    assert found.score <= best * (1 + 1e-9)
    assert found.bits <= budget + solver.TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_it_is_optimal_where_groups_are_too_many_to_try_all(seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 9, 40)
    scores = rng.lognormal(-9, 1.5, (40, 1)) * [25, 20, 1.1, 1.0] * rng.lognormal(0, 0.4, (40, 4))
    quarters = np.round(4 * np.array([*BITS.values(), 16])).astype(int)  # all costs in quarter bits: whole numbers
    least = np.full(weights.sum() * 64 + 1, np.inf)
    least[0] = 0.0
    for weight, row in zip(weights, np.hstack([scores, np.zeros((40, 1))]), strict=True):
        grown = np.full_like(least, np.inf)
        for cost, score in zip(weight * quarters, row, strict=True):
            grown[cost:] = np.minimum(grown[cost:], least[: len(least) - cost] + score)
        least = grown
    for budget in (4.5, 5.3, 7.0, 9.1, 13.0):
        best = least[: int(np.floor(4 * budget * weights.sum() + 1e-6)) + 1].min()
        assert solve(scores, BITS, weights, budget).score == pytest.approx(best, rel=1e-9)


def test_score_and_bits_are_those_of_the_choice():
    scores, weights = np.array([[3.0, 1.0], [2.0, 0.5], [9.0, 4.0]]), [100, 300, 600]
    found = solve(scores, {"four": 4.0, "eight": 8.0}, weights, 10.0)
    bits = {"four": 4.0, "eight": 8.0, None: 16.0}
    assert found.bits == pytest.approx(np.dot([bits[name] for name in found.assignment], weights) / 1000)
    column = {"four": 0, "eight": 1}
    chosen = [scores[g, column[name]] for g, name in enumerate(found.assignment) if name]
    assert found.score == pytest.approx(sum(chosen))


def test_a_candidate_without_a_finite_score_is_not_chosen():
    scores = np.array([[np.nan, 5.0], [1.0, np.inf]])
    found = solve(scores, {"four": 4.0, "eight": 8.0}, [10, 10], 6.0)
    assert found.assignment == ("eight", "four")


def test_a_larger_budget_never_costs_more():
    rng = np.random.default_rng(0)
    scores = rng.lognormal(-9, 1.5, (40, 4))
    curve = solver.pareto(scores, BITS, rng.integers(1, 50, 40) * 4096, np.linspace(4.25, 16, 30))
    values = [s.score for s in curve]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0
    assert values[0] > 0.0


def test_a_budget_below_the_floor_says_the_feasible_range():
    with pytest.raises(UserError, match=r"effective_bits=4 .* 4\.25 to 16"):
        solve(np.array([[1.0]]), {"a": 4.25}, [10], 4.0)


def test_a_floor_that_bad_scores_raise_is_explained():
    scores = np.array([[1.0], [np.nan]])
    with pytest.raises(UserError, match=r"12 to 16; 1 groups without a finite score stay unquantized"):
        solve(scores, {"a": 8.0}, [10, 10], 9.0)


def test_a_budget_above_16_is_refused():
    with pytest.raises(UserError, match="8 to 16"):
        solve(np.array([[1.0]]), {"a": 8.0}, [10], 17.0)


def test_nothing_is_printed(capfd):
    rng = np.random.default_rng(0)
    weights = np.tile([15_728_640, 10_485_760, 49_807_360, 24_903_680], 36)
    scores = rng.lognormal(-9, 1.5, (144, 1)) * [1, 1.2, 20, 22] * rng.lognormal(0, 0.3, (144, 4))
    solver.pareto(scores, {"a": 8.0, "b": 8.0, "c": 4.25, "d": 4.5}, weights, np.linspace(4.3, 12, 6))
    assert capfd.readouterr().out == ""
