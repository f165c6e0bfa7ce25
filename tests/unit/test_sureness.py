"""How sure a scheme is: captions drawn again, on scores whose noise is known."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from layerbits.results.assignment import UNQUANTIZED, Assignment
from layerbits.results.bootstrap import draw, resampled
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.cost_table import Step
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import make_schemes, scheme_of
from layerbits.schemes.report import markdown, metrics
from layerbits.schemes.sizes import GIB, Load, Sizes, Stored
from layerbits.schemes.solved import relaxed as relaxed_of
from layerbits.schemes.solver import pareto, problem, relaxed
from layerbits.schemes.source import combine
from layerbits.schemes.sureness import by_group, in_words, sureness
from layerbits.schemes.sureness import markdown as words_of
from layerbits.schemes.times import Times


def spec(name="mine", budget=10.0, **more):
    return SchemeSpec.from_mapping({"name": name, "effective_bits": budget, "objective": "predicted_kl", **more})


def noisy(make_result, noise, samples=64, blocks=8, pairs=("wint8_afp16",)):
    """A source whose captions scatter around equal shares by a factor."""
    rng = np.random.default_rng(0)
    runs = {}
    for pair in pairs:
        result = make_result(blocks=blocks, samples=samples, pair=pair)
        shares = rng.lognormal(0, noise, (samples, *result.predicted_kl.shape)) if noise else np.ones((samples, 1))
        runs[pair] = replace(result, sample_kl=shares / shares.sum(axis=0) * result.predicted_kl)
    return combine(runs)


@pytest.fixture(scope="module")
def doubtful(make_result):
    """A source with much scatter, and how sure a scheme of it is."""
    source = noisy(make_result, 1.0)
    return source, sureness([spec()], source)


def test_captions_that_agree_leave_no_doubt(make_result):
    (found,) = sureness([spec()], noisy(make_result, 0.0))
    assert found.stable == len(found.chosen)
    assert found.regret == pytest.approx(0, abs=1e-12)
    assert found.needed < found.captions
    assert found.unsure == []


def test_shares_are_of_all_draws_and_the_scheme_is_what_most_of_them_choose(doubtful):
    _, (found,) = doubtful
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    assert (found.agreement > 0.5).mean() > 0.8
    assert 0 < found.stable < len(found.chosen)
    assert found.unsure[0] == found.layers[int(np.argmin(found.agreement))]


def test_more_scatter_means_less_sure_and_more_regret(make_result):
    calm, wild = (sureness([spec()], noisy(make_result, noise))[0] for noise in (0.2, 1.5))
    assert calm.stable > wild.stable
    assert 0 <= calm.regret < wild.regret <= wild.regret_high
    assert calm.needed < wild.needed


def test_the_captions_that_are_needed_are_a_number_of_their_own(make_result):
    few = noisy(make_result, 1.0, samples=40)
    many = replace(
        few, sample_kl=np.tile(few.sample_kl / 4, (4, 1, 1)), sample_tokens=np.tile(few.sample_tokens, 4)
    )  # four times as many of the same captions: the same scatter of one, half the scatter of the mean
    needed = [sureness([spec()], source)[0].needed for source in (few, many)]
    assert needed[1] == pytest.approx(needed[0], rel=0.5)


def test_coverage_and_several_formats_are_drawn_too(make_result):
    source = noisy(make_result, 1.0, pairs=("wint8_afp16", "wfp4_afp16"))
    half, whole = sureness([spec("half", 6.0, coverage=0.5), spec("whole", 6.0)], source, draws=25)
    assert half.choices == ("wint8_afp16", "wfp4_afp16", None)
    assert half.shares[:, -1].mean() > whole.shares[:, -1].mean()  # half of the blocks stay unquantized
    schemes = make_schemes([spec("half", 6.0, coverage=0.5)], source)
    names = [half.choices[k] for k in half.chosen]
    assert names == list(schemes[0].assignment)


@pytest.mark.parametrize(("regret", "said"), [(-0.001, True), (0.001, False)])
def test_a_regret_below_zero_is_explained(doubtful, regret, said):
    (found,) = doubtful[1]
    assert ("regret can be below 0" in words_of([replace(found, regret=regret)])) == said


def test_a_run_without_shares_of_captions_says_nothing(make_result):
    source = combine({"run": make_result(samples=0)})
    assert sureness([spec()], source) == []
    assert "How sure" not in markdown(make_schemes([spec()], source), [])


def test_a_control_has_nothing_to_be_sure_of(doubtful):
    control = SchemeSpec("random", control="random")
    assert len(sureness([spec(), control], doubtful[0], draws=5)) == 1


def test_report_metrics_and_figure(doubtful, tmp_path):
    source, sure = doubtful
    made = make_schemes([spec()], source)
    folder = write_schemes(tmp_path, source, made, sure=sure)
    assert "## How sure" in (folder / "schemes.md").read_text()
    assert (folder / "figures" / "stability_mine.png").stat().st_size > 1000
    assert (folder / "stability.json").exists()
    found = metrics(made, sure)
    assert found["scheme/mine/stable_groups"] == sure[0].stable
    assert found["scheme/mine/regret"] == pytest.approx(sure[0].regret)


def test_the_relaxed_choice_is_near_the_optimum_and_within_the_budget():
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(0, 1, (20, 40, 2)))
    scores[:, :, 1] *= 5
    weights, bits, budget = rng.uniform(1, 3, 40), {"eight": 8.0, "four": 4.25}, 7.0
    costs = problem(scores[0], bits, weights).bits
    for values, choice in zip(scores, relaxed(scores, costs, budget), strict=True):
        (best,) = pareto(values, bits, weights, [budget])
        picked = choice != UNQUANTIZED
        spent = np.average(np.where(picked, np.array([*bits.values()])[choice], 16.0), weights=weights)
        total = values[np.flatnonzero(picked), choice[picked]].sum()
        assert spent <= budget + 1e-6
        assert best.score <= total + 1e-9
        assert total < 1.15 * best.score


SECONDS = {"wint8_afp16": (0.6, 1.2), "wfp4_afp16": (1.2, 0.4)}
"""Of a weight, in every other group; one that is not quantized has 2."""


def with_costs(source):
    """A source with the bytes and seconds of its schemes; fewer bits are not always faster."""
    names = tuple(c.name for c in source.candidates)
    weights = np.array([g.weights for g in source.groups], dtype=float)[:, None]
    stored = Stored(0, weights * np.array([[*(c.bits / 8 for c in source.candidates), 2.0]]), frozenset(names))
    seconds = np.array([[*(SECONDS[name][g % 2] for name in names), 2.0] for g in range(len(weights))])
    times = weights * seconds / weights.sum() * 1e-3
    return replace(
        source,
        sizes=Sizes(names, {"compressed-tensors": stored}, 0, Load()),
        times=Times(names, {"compressed-tensors": times}, 5e-3, Step("decode", 8), "a card"),
    )


def gib_of(source, bits):
    return sum(g.weights for g in source.groups) * bits / 8 / GIB


def test_a_budget_of_memory_is_as_sure_as_one_of_as_many_bits(make_result):
    source = with_costs(noisy(make_result, 1.0, pairs=("wint8_afp16", "wfp4_afp16")))
    (bits,) = sureness([spec(budget=7.0)], source, draws=30)
    (memory,) = sureness([spec(budget=(), budget_gib=gib_of(source, 7.0))], source, draws=30)
    assert (memory.chosen, memory.needed, memory.stable) == (bits.chosen, bits.needed, bits.stable)
    np.testing.assert_array_equal(memory.shares, bits.shares)
    assert (memory.regret, memory.regret_high) == (bits.regret, bits.regret_high)


def test_a_budget_that_is_not_short_changes_nothing(make_result):
    source = with_costs(noisy(make_result, 1.0, pairs=("wint8_afp16", "wfp4_afp16")))
    (alone,) = sureness([spec(budget=(), budget_ms=4.0)], source, draws=30)
    both = sureness([spec(budget=(), budget_ms=4.0, budget_gib=gib_of(source, 16.0))], source, draws=30)[0]
    assert 0 < alone.stable < len(alone.chosen)
    assert {**both.to_json(), "scheme": "mine"} == alone.to_json()


@pytest.mark.parametrize("budgets", [{"budget_ms": 3.7}, {"budget_ms": 3.7, "budget_gib": 7.0}])
def test_each_draw_has_the_best_choice_of_all(make_result, budgets):
    source = with_costs(noisy(make_result, 1.5, samples=10, blocks=2, pairs=("wint8_afp16", "wfp4_afp16")))
    asked = {key: gib_of(source, amount) if key == "budget_gib" else amount for key, amount in budgets.items()}
    mine = spec(budget=(), **asked)
    (found,) = sureness([mine], source, draws=20, seed=3)
    (scheme,) = make_schemes([mine], source)
    assert [found.choices[k] for k in found.chosen] == list(scheme.assignment)
    every = np.array(list(itertools.product(range(3), repeat=len(source.groups))))
    rows = np.arange(len(source.groups))
    milliseconds = (source.times.rest + source.times.formats["compressed-tensors"][rows, every].sum(axis=1)) * 1e3
    within = milliseconds <= asked["budget_ms"] + 1e-9
    if "budget_gib" in asked:
        stored = source.sizes.formats["compressed-tensors"].choices[rows, every].sum(axis=1) / GIB
        assert (within & (stored > asked["budget_gib"])).any()
        within &= stored <= asked["budget_gib"] * (1 + 1e-9)
    lost, agreed = [], np.zeros(len(source.groups))
    for weights in draw(len(source.sample_tokens), 20, 3):
        kl = resampled(source.sample_kl.reshape(len(source.sample_tokens), -1), source.sample_tokens, weights[None])
        values = np.hstack([kl.reshape(len(source.groups), 2), np.zeros((len(source.groups), 1))])
        sums = np.where(within, values[rows, every].sum(axis=1), np.inf)
        lost.append(values[rows, list(found.chosen)].sum() - sums.min())
        agreed += every[sums.argmin()] == found.chosen
    assert found.regret == pytest.approx(np.mean(lost))
    np.testing.assert_allclose(found.agreement, agreed / 20)
    assert found.regret > 0


def test_several_budgets_are_weighed_into_one_that_leads_near_the_optimum(make_result):
    source = with_costs(noisy(make_result, 0.5, blocks=12, pairs=("wint8_afp16", "wfp4_afp16")))
    both = spec(budget=(), budget_gib=gib_of(source, 7.0), budget_ms=3.7)
    (exact,) = make_schemes([both], source)
    (near,) = relaxed_of(both, source, source.predicted_kl)
    (choice,) = near.choices(source.predicted_kl[None])
    names = [c.name for c in source.candidates]
    relaxed_scheme = scheme_of("near", Assignment.at(choice.tolist(), names), source, {})
    assert relaxed_scheme.predicted_kl == pytest.approx(exact.predicted_kl, rel=0.15)
    assert relaxed_scheme.size["gib"] < 1.02 * both.budget_gib[0]
    assert relaxed_scheme.size["ms"] < 1.02 * both.budget_ms[0]
    alone = make_schemes(
        [spec("memory", (), budget_gib=both.budget_gib), spec("time", (), budget_ms=both.budget_ms)], source
    )
    assert all(exact.predicted_kl > 1.01 * one.predicted_kl for one in alone)  # both are short


def test_what_cannot_be_counted_is_chosen_by_no_draw(make_result):
    source = with_costs(noisy(make_result, 0.2, pairs=("wint8_afp16", "wfp4_afp16")))
    times = source.times.formats["compressed-tensors"].copy()
    times[:, 0] = np.inf
    source = replace(source, times=replace(source.times, formats={"compressed-tensors": times}))
    (found,) = sureness([spec(budget=(), budget_ms=4.5)], source, draws=20)
    assert not found.shares[:, 0].any()
    assert math.isfinite(found.needed)


def test_schemes_by_memory_and_time_have_report_metrics_and_figure(make_result, tmp_path):
    source = with_costs(noisy(make_result, 1.0))
    specs = [spec("gib", (), budget_gib=gib_of(source, 10.0)), spec("ms", (), budget_ms=[4.7, 4.9])]
    made, sure = make_schemes(specs, source), sureness(specs, source, draws=10)
    assert [one.scheme for one in sure] == [scheme.name for scheme in made] == ["gib", "ms_ms_4.7", "ms_ms_4.9"]
    folder = write_schemes(tmp_path, source, made, sure=sure)
    text = (folder / "schemes.md").read_text()
    assert "| gib |" in text.split("## How sure")[1]
    found = metrics(made, sure)
    for one in sure:
        assert (folder / "figures" / f"stability_{one.scheme}.png").exists()
        assert found[f"scheme/{one.scheme}/stable_groups"] == one.stable


def test_frames_for_the_command_line(doubtful):
    found = sureness([spec("bits", [9.0, 11.0])], doubtful[0], draws=10)
    assert list(in_words(found)["scheme"]) == ["bits_9", "bits_11"]
    groups = by_group(found)
    assert len(groups) == 2 * len(found[0].layers)
    np.testing.assert_allclose(groups["wint8_afp16"] + groups["unquantized"], 1)
    first = groups.iloc[0]
    assert first["agreement"] == pytest.approx(first[first["chosen"]])
